"""Small inline HTML drawings: how moments and predictions show themselves in a notebook.

Plain `<div>` bars, no script and no style sheet, legible on light and dark pages; the same colours
as the figures of `tvg_lib.viz`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

TRUTH = "#009E73"
ANSWER = "#0072B2"

_ROW = "display:flex;align-items:center;margin:2px 0"
_LABEL = "flex:0 0 7em;text-align:right;padding-right:8px;opacity:0.75"
_TRACK = "flex:1 1 auto;position:relative;height:12px;background:rgba(128,128,128,0.18)"
_NOTE = "flex:0 0 15em;padding-left:8px;font-variant-numeric:tabular-nums"


@dataclass(frozen=True)
class Row:
    """One line of a drawing: a label, spans in seconds, their colour, and a note at the end."""

    label: str
    spans: Sequence[tuple[float, float]]
    colour: str
    note: str = ""


def clock(seconds: float, duration: float) -> str:
    """A time as it is read best in something that lasts `duration` seconds.

    12.4 s up to five minutes, 12:34 up to an hour, 1:02:03 beyond.
    """
    if duration <= 300:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if duration <= 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def span(start: float, end: float, duration: float) -> str:
    """Both ends of a moment: `12.4-20.0 s` or `12:34-13:10`."""
    first, last = clock(start, duration), clock(end, duration)
    return f"{first.removesuffix(' s')}–{last}"


def bars(rows: Sequence[Row], duration: float, title: str = "") -> str:
    """Rows of bars over one time axis from 0 to `duration` seconds, as HTML."""
    scale = 100 / max(duration, 1e-9)
    lines = [f"<div><b>{escape(title)}</b></div>"] if title else []
    for row in rows:
        spans = "".join(
            f'<div style="position:absolute;left:{start * scale:.2f}%;'
            f"width:{max((end - start) * scale, 0.3):.2f}%;height:100%;"
            f'background:{row.colour}"></div>'
            for start, end in row.spans
        )
        lines.append(_line(row.label, f'<div style="{_TRACK}">{spans}</div>', row.note))
    ends = (
        '<div style="flex:1 1 auto;display:flex;justify-content:space-between;opacity:0.75">'
        f"<span>{clock(0, duration)}</span><span>{clock(duration, duration)}</span></div>"
    )
    lines.append(_line("", ends, ""))
    body = "".join(lines)
    return f'<div style="max-width:760px;font-size:13px;line-height:1.3">{body}</div>'


def _line(label: str, middle: str, note: str) -> str:
    return (
        f'<div style="{_ROW}"><div style="{_LABEL}">{escape(label)}</div>{middle}'
        f'<div style="{_NOTE}">{escape(note)}</div></div>'
    )
