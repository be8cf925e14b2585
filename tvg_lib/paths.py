"""Where things are. Code asks here and never builds a path relative to the working folder.

    root()       the checkout: notebooks/, params/, results/, figures/
    runs()       what a run on this machine writes (git-ignored)
    results()    committed records and the papers' printed numbers
    figures()    committed figures
    cache()      arrays that are slow to make and safe to delete
    data()       real data placed by the user (`TVG_DATA`), or None

Environment variables: `TVG_ROOT` (the checkout, when the package is installed elsewhere),
`TVG_DATA`, `TVG_CACHE`.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from tvg_lib.errors import ConfigurationError


def root() -> Path:
    """The checkout that holds the notebooks, parameters and results.

    Raises:
        ConfigurationError: if neither `TVG_ROOT` nor the folder above the package is a checkout.
    """
    named = os.environ.get("TVG_ROOT")
    folder = Path(named).expanduser() if named else Path(__file__).resolve().parent.parent
    if not (folder / "notebooks").is_dir():
        raise ConfigurationError(
            f"{str(folder)!r} is not a checkout of TVG Companion (it has no notebooks/ folder); "
            "install the package with `pip install -e` or set TVG_ROOT to the checkout"
        )
    return folder.resolve()


def notebooks() -> Path:
    """Folder of the numbered notebooks."""
    return root() / "notebooks"


def params() -> Path:
    """Folder of the notebooks' parameters, one folder a scale, one YAML file a notebook."""
    return root() / "params"


def runs(scale: str | None = None) -> Path:
    """Folder for everything a run on this machine writes; one folder a scale below it."""
    folder = root() / "runs"
    return folder if scale is None else folder / scale


def results() -> Path:
    """Folder of the committed records and of the papers' tables."""
    return root() / "results"


def figures() -> Path:
    """Folder of the committed figures."""
    return root() / "figures"


def cache() -> Path:
    """Folder for computed arrays and downloads (`TVG_CACHE`, or the platform's cache folder)."""
    named = os.environ.get("TVG_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("tvg-companion"))


def data() -> Path | None:
    """Folder of real data placed by the user, or None where `TVG_DATA` is not set.

    Raises:
        ConfigurationError: if `TVG_DATA` names something that is not a folder.
    """
    named = os.environ.get("TVG_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(f"TVG_DATA={named!r} is not a folder")
    return folder.resolve()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file whole or not at all: a reader, or a kill, finds the old content or the new one.

    Yields a temporary file in the folder of `target` (made if need be) and with its ending. It
    takes the name of `target` only if the block ends well, and is synced first, so that a power cut
    leaves no hollow file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-", suffix=f"-{target.name}")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a committed record is an ordinary one.
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; makes its folder."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
