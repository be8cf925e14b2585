"""Pictures of a script: any times of a film, straight to arrays, thousands of frames a second.

A shape is a table of signed distances, drawn through a rotation and a scale; one lookup a pixel
gives an edge that is smooth at every size and angle. All frames of a chunk are drawn at once, one
actor after the other. Where an actor is at a time follows from the script alone, so frames can be
drawn in any order and number, and equal times give equal frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import pi

import numpy as np

from tvg_lib.errors import ConfigurationError
from tvg_lib.shapestories import world
from tvg_lib.shapestories.world import Event, Script

SIZE = 64  # pixels of a frame, both ways
CHUNK = 64  # frames drawn together: what fits a processor's cache

_RADIUS = {"small": 8.0, "big": 10.8}  # pixels
_PATCH = 54  # pixels of the square in which one actor is drawn: room for a grown big one
_TABLE = 96  # entries of a table of distances, both ways
_REACH = 1.35  # how far the table goes, in radii
_MARK = 0.55  # brightness of the marked half, by which a spin is seen

_RGB = {
    "red": (222, 38, 42),
    "orange": (245, 138, 20),
    "yellow": (246, 224, 52),
    "green": (36, 158, 62),
    "blue": (44, 82, 214),
    "purple": (148, 52, 190),
}
PALETTE = tuple((r / 255, g / 255, b / 255) for r, g, b in _RGB.values())  # of the actors
_SKY = {  # top and bottom of the sky, the ground
    "day": ((134, 190, 236), (196, 222, 240), (150, 176, 128)),
    "sunset": ((186, 110, 120), (240, 178, 124), (136, 112, 100)),
    "night": ((16, 20, 50), (38, 44, 84), (34, 42, 54)),
    "dawn": ((176, 168, 208), (238, 206, 210), (146, 150, 142)),
}


@dataclass(frozen=True)
class RenderConfig:
    """How hard the pictures are to read.

    Attributes:
        noise: standard deviation of the sensor's noise, in grey levels of 255.
        scale: of the actors' size.
        fog: share of the picture that fog covers, in [0, 1].
    """

    noise: float = 5.0
    scale: float = 1.0
    fog: float = 0.4

    def __post_init__(self) -> None:
        if not (self.noise >= 0 and 0 < self.scale <= 1.1 and 0 <= self.fog <= 1):
            raise ConfigurationError(
                f"noise is not negative, scale in (0, 1.1], fog in [0, 1]: {self}"
            )


@dataclass(frozen=True)
class Poses:
    """Where and how all actors are at N times.

    Attributes:
        x, y: (N, A) pixels.
        radius: (N, A) pixels; 0 where an actor is not to be seen.
        angle: (N, A) radians.
        behind: (N, A) whether it is drawn before the others.
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    behind: np.ndarray


def render(script: Script, times: np.ndarray, config: RenderConfig | None = None) -> np.ndarray:
    """Frames of a film.

    Args:
        script: of the film.
        times: (N,) seconds, in any order.
        config: how hard the pictures are to read.

    Returns:
        (N, 64, 64, 3) uint8, RGB.
    """
    config = RenderConfig() if config is None else config
    times = np.asarray(times, dtype=np.float64)
    frames = np.empty((len(times), SIZE, SIZE, 3), np.uint8)
    for start in range(0, len(times), CHUNK):
        part = times[start : start + CHUNK]
        frames[start : start + CHUNK] = _draw(script, part, config)
    return frames


# --- where everybody is ---------------------------------------------------------------------------


def poses(script: Script, times: np.ndarray, scale: float = 1.0) -> Poses:
    """Where all actors are at N times.

    Args:
        script: of the film.
        times: (N,) seconds.
        scale: of the actors' size.
    """
    N, A = len(times), len(script.cast)
    first, last = (times.min(), times.max()) if N else (0.0, 0.0)
    x, y = np.full((N, A), -1.0), np.full((N, A), -1.0)
    home, there = np.zeros((N, A)), np.zeros((N, A), bool)
    drift = np.arange(A) * 2.4
    for stay in script.stays:
        if stay.start <= last and first < stay.end:
            now, a = (stay.start <= times) & (times < stay.end), stay.actor
            there[now, a], home[now, a] = True, stay.x
            x[now, a] = stay.x + 0.015 * np.sin(0.9 * times[now] + drift[a])
            y[now, a] = stay.y + 0.012 * np.sin(0.7 * times[now] + 2 * drift[a])
    size = np.array([_RADIUS[actor.size] for actor in script.cast]) * scale / SIZE
    radius = np.where(there, size, 0.0)
    angle, behind = np.zeros((N, A)), np.zeros((N, A), bool)
    near = [e for e in script.actions if e.start <= last and first <= e.end]
    for whole in script.activities:
        if whole.start <= last and first <= whole.end and whole.partner is not None:
            _gather(whole, times, x, y)
    for event in near:
        _alone(event, times, home, x, y, radius, angle)
    for event in near:  # where all others stand must be known
        if event.partner is not None:
            _together(event, times, x, y, size, behind)
    # Vectorised sines differ in the last digit with the place in the array; a pixel must not.
    x, y, radius = (np.round(p * SIZE, 5) for p in (x, y.clip(0.05, 0.95), radius))
    return Poses(x, y, radius, np.round(angle, 6), behind & (radius > 0))


def _during(event: Event, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which times lie in an event, and how far it is then, in [0, 1]."""
    now = np.flatnonzero((event.start <= times) & (times < event.end))
    return now, (times[now] - event.start) / (event.end - event.start)


def _ramp(u: np.ndarray, width: float) -> np.ndarray:
    """From 0 up to 1 and back to 0 at the end, smoothly."""
    w = np.clip(np.minimum(u, 1 - u) / width, 0, 1)
    return w * w * (3 - 2 * w)


def _cycles(event: Event, seconds: float) -> int:
    return max(1, round((event.end - event.start) / seconds))


def _gather(whole: Event, times: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Who acts together stands together: both walk to the middle between their places."""
    now, u = _during(whole, times)
    a, b = whole.actor, whole.partner
    w = _ramp(u, min(0.3, 2 / (whole.end - whole.start)))
    middle_x, middle_y = (x[now, a] + x[now, b]) / 2, (y[now, a] + y[now, b]) / 2
    for who, side in ((a, -1), (b, 1)):
        x[now, who] += w * (np.clip(middle_x, 0.3, 0.7) + side * 0.14 - x[now, who])
        y[now, who] += w * (np.clip(middle_y, 0.3, 0.75) - y[now, who])


def _alone(
    event: Event,
    times: np.ndarray,
    home: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    angle: np.ndarray,
) -> None:
    """What an action does to its actor in its place, and to one who is followed."""
    now, u = _during(event, times)
    a = event.actor
    if event.verb in world.PASSAGES:
        away = 1 - u if event.verb == "enter" else u
        outside = np.where(home[now, a] < 0.5, -0.15, 1.15)  # through the nearer edge
        x[now, a] += away * (outside - x[now, a])
    elif event.verb == "jump":
        y[now, a] -= 0.16 * np.abs(np.sin(pi * _cycles(event, 0.9) * u))
    elif event.verb == "spin":
        angle[now, a] += 2 * pi * _cycles(event, 1.6) * u
    elif event.verb == "grow":
        radius[now, a] *= 1 + 0.6 * _swell(event, u)
    elif event.verb == "shrink":
        radius[now, a] *= 1 - 0.65 * _swell(event, u)
    elif event.verb == "blink":
        radius[now, a] *= (times[now] - event.start) % 0.8 < 0.4
    elif event.verb == "follow":
        shift_x, shift_y = _tour(event, u)
        x[now, event.partner] += shift_x
        y[now, event.partner] += shift_y


def _swell(event: Event, u: np.ndarray) -> np.ndarray:
    """From 0 slowly up to 1 and quickly back, about every 2.2 seconds, as long as a clip looks."""
    v = u * _cycles(event, 2.2) % 1
    return np.minimum(v / 0.9, (1 - v) / 0.1)


def _tour(event: Event, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The way of one who is followed: loops that begin and end at its place."""
    phase = 2 * pi * _cycles(event, 4) * np.clip(u, 0, 1)
    return 0.2 * np.sin(phase), 0.1 * np.sin(2 * phase)


def _together(
    event: Event,
    times: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    size: np.ndarray,
    behind: np.ndarray,
) -> None:
    """Actions that take an actor to another."""
    now, u = _during(event, times)
    a, b = event.actor, event.partner
    away_x, away_y = x[now, a] - x[now, b], y[now, a] - y[now, b]
    distance = np.hypot(away_x, away_y).clip(min=1e-6)
    away_x, away_y = away_x / distance, away_y / distance
    touching = size[a] + size[b]
    target_x, target_y = x[now, b], y[now, b]
    apart = 0.0  # from the target, on the actor's own side
    if event.verb == "bump":
        cycle = u * _cycles(event, 1.5) % 1
        w = 1 - np.abs(2 * cycle - 1)
        apart = 0.85 * touching
        push = 0.07 * np.clip(1 - np.abs(cycle - 0.56) / 0.12, 0, 1)
        x[now, b] -= push * away_x
        y[now, b] -= push * away_y
    elif event.verb == "circle":
        w = _ramp(u, 0.2)
        phase = 2 * pi * _cycles(event, 2.2) * u
        target_x = target_x + (touching + 0.05) * np.cos(phase)
        target_y = target_y + (touching + 0.05) * np.sin(phase)
    elif event.verb == "follow":
        w = _ramp(u, 0.2)
        here, before = _tour(event, u), _tour(event, u - 0.6 / (event.end - event.start))
        target_x = target_x - here[0] + before[0]
        target_y = target_y - here[1] + before[1]
    else:  # hide, and peek out: who cannot be seen at all could be anybody
        w = _ramp(u, 0.3)
        apart = 0.55 * size[b]
        behind[now, a] = True
    x[now, a] += w * (target_x + apart * away_x - x[now, a])
    y[now, a] += w * (target_y + apart * away_y - y[now, a])


# --- drawing --------------------------------------------------------------------------------------


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the edge of a shape of radius 1 round the origin, negative inside."""
    if shape == "circle":
        return np.hypot(u, v) - 0.92
    if shape == "cross":
        inside = [
            np.maximum(np.abs(u) - long, np.abs(v) - wide)
            for long, wide in ((0.98, 0.32), (0.32, 0.98))
        ]
        return np.minimum(*inside)
    if shape == "star":
        turn = 2 * pi / 5
        theta = np.arctan2(u, -v)
        theta = np.abs((theta + turn / 2) % turn - turn / 2)
        r = np.hypot(u, v)
        p = np.stack([r * np.cos(theta), r * np.sin(theta)])  # one tenth of the star
        tip, notch = np.array([1.1, 0.0]), 0.46 * np.array([np.cos(turn / 2), np.sin(turn / 2)])
        edge = notch - tip
        normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
        side = (p - tip[:, None, None]) * normal[:, None, None]
        return -side.sum(0)
    corners = {"square": 4, "triangle": 3, "diamond": 4}[shape]
    start = {"square": pi / 4, "triangle": 0.0, "diamond": 0.0}[shape]
    reach = {"square": 1.1, "triangle": 1.15, "diamond": 1.1}[shape]
    wide = 0.68 if shape == "diamond" else 1.0  # a diamond is a narrow square on its tip
    theta = start + 2 * pi * np.arange(corners) / corners + pi / corners  # normals of the sides
    depth = reach * np.cos(pi / corners)
    sides = [np.sin(t) * u / wide - np.cos(t) * v - depth for t in theta]
    return np.max(sides, axis=0) * (0.85 if shape == "diamond" else 1.0)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Distances of all shapes (S, TABLE * TABLE), and brightness (TABLE * TABLE), float32."""
    axis = (np.arange(_TABLE) + 0.5) / _TABLE * 2 * _REACH - _REACH
    u, v = np.meshgrid(axis, axis)
    distances = np.stack([_distance(shape, u, v).ravel() for shape in world.SHAPES])
    # What lies beyond the table is read from its rim, so that must be far outside of every shape;
    # beyond the tip of a star the distance to its edges grows slowly.
    rim = (np.abs(u) > axis[-2]) | (np.abs(v) > axis[-2])
    distances[:, rim.ravel()] = 1.0
    half = np.clip(0.5 - 4 * u, 0, 1).ravel()
    return distances.astype(np.float32), (1 - (1 - _MARK) * half).astype(np.float32)


@lru_cache(maxsize=4)
def _noise(deviation: float) -> np.ndarray:
    """(K, 64, 64, 3) int16; a frame takes one of them."""
    bank = np.random.default_rng(7).normal(scale=deviation, size=(61, SIZE, SIZE, 3))
    return np.round(bank).astype(np.int16)


@lru_cache(maxsize=2)
def _falling(kind: str) -> np.ndarray:
    """(K, M) pixels (line * 64 + column) that rain or snow covers, for K moments of its fall."""
    drops, length, speed = (46, 6, 11) if kind == "rain" else (60, 2, 3)
    rng = np.random.default_rng(11)
    column, row = rng.integers(0, SIZE, (2, drops, 1))
    step = np.arange(length)
    bank = []
    for moment in range(64):
        sway = -step // 3 if kind == "rain" else (moment // 4 + column) % 3
        lines, columns = (row + speed * moment + step) % SIZE, (column + sway) % SIZE
        bank.append((lines * SIZE + columns).ravel())
    return np.stack(bank)


@lru_cache(maxsize=64)
def _backdrops(look: int) -> np.ndarray:
    """(4, 64, 64, 3) int16 the empty stage in every daylight; hills differ from film to film."""
    rng = np.random.default_rng(look)
    line = 0.66 + 0.1 * rng.uniform(-1, 1)
    waves = zip(rng.uniform(0.01, 0.05, 3), rng.uniform(2, 9, 3), rng.uniform(0, 6, 3), strict=True)
    across = np.arange(SIZE) / SIZE
    hills = line + sum(height * np.sin(rate * across + phase) for height, rate, phase in waves)
    down = across[:, None]
    ground = np.clip((down - hills) * SIZE + 0.5, 0, 1)[..., None]
    light = rng.uniform(0.9, 1.08)
    stages = []
    for kind in world.DAYLIGHTS:
        top, bottom, earth = (np.array(rgb, np.float32) for rgb in _SKY[kind])
        sky = top + (bottom - top) * down[..., None]
        stages.append(light * (sky * (1 - ground) + earth * ground))
    return np.clip(np.stack(stages), 0, 255).astype(np.int16)


def _kinds(scenes: tuple[world.Scene, ...], times: np.ndarray) -> np.ndarray:
    """(N,) the kind of scene at each time."""
    ends = np.array([scene.end for scene in scenes])
    at = np.searchsorted(ends, times, side="right").clip(max=len(scenes) - 1)
    return np.array([scene.kind for scene in scenes])[at]


def _draw(script: Script, times: np.ndarray, config: RenderConfig) -> np.ndarray:
    """(N, 64, 64, 3) uint8, all at once."""
    daylight = _kinds(script.daylights, times)
    light = np.array([world.DAYLIGHTS.index(kind) for kind in daylight])
    canvas = _backdrops(script.look)[light]
    pose = poses(script, times, config.scale)
    dim = np.where(daylight == "night", 0.62, 1.0).astype(np.float32)
    for back in (True, False):
        for a, actor in enumerate(script.cast):
            rows = np.flatnonzero((pose.radius[:, a] > 0.2) & (pose.behind[:, a] == back))
            if len(rows):
                _draw_actor(canvas, rows, actor, pose, a, dim)
    _draw_weather(canvas, _kinds(script.weathers, times), times, config)
    if config.noise:
        bank = _noise(config.noise)
        # Hundredths of a second: the noise of a frame depends on its time alone.
        pick = (np.round(times * 100).astype(np.int64) * 29 + script.look) % len(bank)
        canvas += bank[pick]
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _draw_actor(
    canvas: np.ndarray, rows: np.ndarray, actor: world.Actor, pose: Poses, a: int, dim: np.ndarray
) -> None:
    """Blend one actor into the frames `rows` of a canvas (N, 64, 64, 3)."""
    distances, brightness = _tables()
    table = distances[world.SHAPES.index(actor.shape)]
    x, y, radius = (p[rows, a].astype(np.float32) for p in (pose.x, pose.y, pose.radius))
    angle = pose.angle[rows, a].astype(np.float32)
    reach = int(np.ceil(min(radius.max() * _REACH + 1, _PATCH / 2)))
    offsets = np.arange(-reach, reach + 1)
    columns = np.floor(x).astype(np.int64)[:, None] + offsets  # (n, P)
    lines = np.floor(y).astype(np.int64)[:, None] + offsets
    zoom = _TABLE / (2 * _REACH) / radius
    dx = (columns + 0.5 - x[:, None]).astype(np.float32) * zoom[:, None]
    dy = (lines + 0.5 - y[:, None]).astype(np.float32) * zoom[:, None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    middle, last = np.float32(_TABLE / 2), np.float32(_TABLE - 1)
    u = (cos * dx)[:, None, :] + (sin * dy + middle)[:, :, None]
    v = (-sin * dx)[:, None, :] + (cos * dy + middle)[:, :, None]
    # The rim of the table is outside of every shape, so what lies beyond may be read from it.
    entry = np.clip(v, 0, last, out=v).astype(np.int32) * _TABLE
    entry += np.clip(u, 0, last, out=u).astype(np.int32)
    cover = 0.5 - table[entry] * radius[:, None, None]
    frame, line, column = np.nonzero(cover > 0)
    alpha = cover[frame, line, column].clip(max=1)[:, None]
    paint = brightness[entry[frame, line, column]] * dim[rows][frame]
    rgb = paint[:, None] * np.array(_RGB[actor.colour], np.float32)
    to_line, to_column = lines[frame, line], columns[frame, column]
    inside = (to_line >= 0) & (to_line < SIZE) & (to_column >= 0) & (to_column < SIZE)
    if not inside.all():
        alpha, rgb = alpha[inside], rgb[inside]
        frame, to_line, to_column = frame[inside], to_line[inside], to_column[inside]
    at = rows[frame], to_line, to_column
    under = canvas[at]
    canvas[at] = under + alpha * (rgb - under)


def _draw_weather(
    canvas: np.ndarray, weather: np.ndarray, times: np.ndarray, config: RenderConfig
) -> None:
    moment = np.round(times * 8).astype(np.int64)
    rows = np.flatnonzero(weather == "storm")
    if len(rows):  # darker, with flashes
        flash = (moment[rows] * 7 // 3) % 23 < 2
        canvas[rows] = (
            canvas[rows] * np.where(flash, 21, 10).astype(np.int16)[:, None, None, None] // 16
        )
    rows = np.flatnonzero(weather == "fog")
    if len(rows):
        share = round(32 * config.fog)
        canvas[rows] = (canvas[rows] * np.int16(32 - share) + np.int16(205 * share)) // 32
    pixels = canvas.reshape(len(canvas), SIZE * SIZE, 3)
    for kind, share, grey in (("rain", 0.45, 190), ("storm", 0.45, 130), ("snow", 0.8, 250)):
        rows = np.flatnonzero(weather == kind)
        if len(rows):
            covered = _falling("snow" if kind == "snow" else "rain")[moment[rows] % 64]
            at = rows[:, None], covered
            pixels[at] = pixels[at] * (1 - share) + share * grey


def frames(
    script: Script, fps: float, config: RenderConfig | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Time and picture of every frame of a film, a chunk in memory at a time."""
    times = np.arange(round(script.duration * fps)) / fps
    for start in range(0, len(times), CHUNK):
        part = times[start : start + CHUNK]
        yield from zip(part.tolist(), render(script, part, config), strict=True)
