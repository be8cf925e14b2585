"""TVG Companion: four papers on finding moments in video by language, one small library."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvg_lib.grounder import Grounder

__all__ = ["Grounder"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The front door, imported when asked for: the package itself loads nothing."""
    if name == "Grounder":
        from tvg_lib.grounder import Grounder

        return Grounder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
