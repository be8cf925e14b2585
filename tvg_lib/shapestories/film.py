"""A film that can be looked at: encoded to mp4, and played in a notebook above its timeline."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from html import escape
from io import BytesIO
from pathlib import Path

from tvg_lib import inline, paths
from tvg_lib.errors import ConfigurationError
from tvg_lib.shapestories.render import SIZE, RenderConfig, frames
from tvg_lib.shapestories.world import Script

FPS = 8  # the encoder looks at every second of these frames


def encode_mp4(
    script: Script, fps: int = FPS, look: RenderConfig | None = None, quality: int = 23
) -> bytes:
    """A film as mp4 (H.264), by PyAV; frame k is the picture at k / fps seconds.

    Args:
        script: of the film.
        fps: frames a second.
        look: of the pictures.
        quality: x264's constant rate factor, 0 (lossless) to 51; lower is larger.

    Raises:
        ConfigurationError: no positive number of frames a second.
    """
    if fps < 1:
        raise ConfigurationError(f"a film has a frame a second or more, found fps={fps}")
    import av

    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        # With B-frames x264 packs the same pictures into other bytes on every run.
        stream.options = {"crf": str(quality), "preset": "medium", "threads": "1", "bf": "0"}
        for number, (_, pixels) in enumerate(frames(script, fps, look)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_mp4(
    script: Script, path: Path | str, fps: int = FPS, look: RenderConfig | None = None
) -> Path:
    """Write a film as an mp4 file, whole or not at all; arguments as of `encode_mp4`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = encode_mp4(script, fps, look)
    with paths.replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


@dataclass(frozen=True)
class Player:
    """A film with rows of moments below it; a notebook plays it, elsewhere it is a line of text.

    Attributes:
        script: of the film.
        rows: what is marked on the timeline: a label and (M, 2) seconds or pairs each.
        look: of the pictures.
        fps: frames a second.
        quality: as of `encode_mp4`; a notebook file holds the whole film.
    """

    script: Script
    rows: Sequence[tuple[str, Sequence]] = ()
    look: RenderConfig | None = field(default=None, repr=False)
    fps: int = FPS
    quality: int = 34

    def __repr__(self) -> str:
        return f"Player({self.script!r}, {len(self.rows)} rows)"

    def _repr_html_(self) -> str:
        data = encode_mp4(self.script, self.fps, self.look, self.quality)
        source = base64.b64encode(data).decode()
        colours = (inline.TRUTH, inline.ANSWER)
        rows = [
            inline.Row("", [(float(a), float(b)) for a, b in moments], colours[i % 2], label)
            for i, (label, moments) in enumerate(self.rows)
        ]
        return (
            f"<div><b>{escape(self.script.id)}</b></div>"
            '<video controls loop width="384" height="384" style="image-rendering:pixelated" '
            f'src="data:video/mp4;base64,{source}"></video>'
            f"{inline.bars(rows, self.script.duration)}"
        )
