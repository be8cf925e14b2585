"""What the tiny dual encoder learns from: windows of training films, each with a true sentence.

The sentences are those that a window of two seconds can show: an action, an activity going on,
who is there, the scene, and an action in a scene. Which sentence of a batch is true of which window
is known from the scripts, so a sentence that happens to be true of another window is never held
against it.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from random import Random

import numpy as np

from tvg_lib.shapestories import world
from tvg_lib.shapestories.generator import SHORT, write_script
from tvg_lib.shapestories.language import (
    Deed,
    Meaning,
    Presence,
    Relative,
    Setting,
    Who,
    describes,
    say,
)
from tvg_lib.shapestories.questions import name_of
from tvg_lib.shapestories.render import SIZE, RenderConfig, render
from tvg_lib.shapestories.world import Event, Scene, Script, Stay

_KINDS = {"action": 0.64, "activity": 0.14, "presence": 0.08, "setting": 0.06, "both": 0.08}
_VAGUE = 0.35  # of the actors are named by colour or shape only
_SIZED = 0.25  # of the others are named with their size

CROWDED = replace(SHORT, pause=(4, 30), busy=0.4)
"""Films to learn from: fuller than those of the data sets, so that each window teaches more."""


@dataclass(frozen=True)
class View:
    """What happens in a window of a film, as far as the window can show it.

    An action counts if the window shows one half of it or is half filled by it.
    """

    script: Script
    start: float
    end: float
    events: tuple[Event, ...]
    stays: tuple[Stay, ...]
    settings: tuple[str, ...]

    @classmethod
    def of(cls, script: Script, start: float, end: float) -> "View":
        """The view of the seconds from `start` to `end`."""

        def shown(item: Event | Stay | Scene) -> bool:
            overlap = min(end, item.end) - max(start, item.start)
            return overlap >= 0.5 * min(end - start, item.end - item.start)

        return cls(
            script,
            start,
            end,
            tuple(filter(shown, (*script.actions, *script.activities))),
            tuple(filter(shown, script.stays)),
            tuple(s.kind for s in (*script.daylights, *script.weathers) if shown(s)),
        )

    @cached_property
    def by_verb(self) -> dict[str, list[Event]]:
        """The events of each verb."""
        events: dict[str, list[Event]] = {}
        for event in self.events:
            events.setdefault(event.verb, []).append(event)
        return events

    def shows(self, meaning: Meaning) -> bool:
        """Whether a meaning is true of the window; one that needs more than a window never is."""
        if isinstance(meaning, Deed):
            same = self.by_verb.get(meaning.verb, ())
            return any(describes(meaning, self.script, event) for event in same)
        if isinstance(meaning, Presence):
            return any(meaning.who.fits(self.script.cast[stay.actor]) for stay in self.stays)
        if isinstance(meaning, Setting):
            asked = (meaning.daylight, meaning.weather)
            return all(kind is None or kind in self.settings for kind in asked)
        if isinstance(meaning, Relative) and meaning.relation == "while":
            return self.shows(meaning.base) and self.shows(meaning.other)
        return False


def tell(view: View) -> str:
    """What a view shows, in the plainest words: what happens, else who is there, else the scene."""

    def name(actor: int | None) -> Who | None:
        return None if actor is None else name_of(view.script, actor)

    told: list[Meaning] = [
        Deed(event.verb, name_of(view.script, event.actor), name(event.partner)).ordered()
        for event in view.events
    ]
    told = told or [Presence(name_of(view.script, stay.actor)) for stay in view.stays]
    told = told or [Setting(kind) for kind in view.settings if kind in world.DAYLIGHTS]
    return "; ".join(dict.fromkeys(map(say, told)))


@dataclass(frozen=True)
class PairSource:
    """Draws windows and sentences; a `Draw` of `tvg_lib.encoders.tiny.PairPlan`.

    Attributes:
        frames: of a window, each in the middle of its share of the window.
        window: seconds.
        films: how many windows are drawn from; as long as those of `SHORT`, but fuller.
        windows_per_film: of one batch.
        sentences: said of each window.
        seed: of the world.
        look: how hard the pictures are.
        split: films of the test split show what the encoder has never been told.
    """

    frames: int
    window: float
    films: int = 2000
    windows_per_film: int = 16
    sentences: int = 4
    seed: int = 0
    look: RenderConfig = field(default_factory=RenderConfig)
    split: str = "train"

    def __call__(
        self, rng: np.random.Generator, count: int
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """(count, F, SIZE, SIZE, 3) uint8 windows, sentences, and which is true of which."""
        draw = Random(int(rng.integers(2**62)))
        views: list[View] = []
        meanings: list[Meaning] = []
        windows = np.empty((count, self.frames, SIZE, SIZE, 3), np.uint8)
        offsets = (np.arange(self.frames) + 0.5) / self.frames * self.window
        while len(views) < count:
            script = _film(self.split, draw.randrange(self.films), self.seed)
            starts = [
                self._start(script, draw)
                for _ in range(min(self.windows_per_film, count - len(views)))
            ]
            frames = render(script, np.add.outer(starts, offsets).ravel(), self.look)
            at = len(views)
            windows[at : at + len(starts)] = frames.reshape(len(starts), self.frames, SIZE, SIZE, 3)
            for start in starts:
                views.append(View.of(script, start, start + self.window))
                meanings += [_describe(views[-1], draw) for _ in range(self.sentences)]
        matches = np.array([[view.shows(meaning) for meaning in meanings] for view in views])
        return windows, [say(meaning, draw) for meaning in meanings], matches

    def _start(self, script: Script, draw: Random) -> float:
        """Where something happens, more often than not; on a frame of the film."""
        if script.actions and draw.random() < 0.85:
            event = draw.choice(script.actions)
            middle = draw.uniform(event.start, event.end)
        else:
            middle = draw.uniform(0, script.duration)
        latest = script.duration - self.window
        return round(min(max(middle - self.window / 2, 0), latest) * 8) / 8


@lru_cache(maxsize=4096)
def _film(split: str, number: int, seed: int) -> Script:
    return write_script(CROWDED, split, number, seed)


def _describe(view: View, draw: Random) -> Meaning:
    """A meaning that is true of a view."""
    actions = [e for e in view.events if e.verb in world.ACTIONS]
    activities = [e for e in view.events if e.verb in world.ACTIVITIES]
    kind = draw.choices(list(_KINDS), list(_KINDS.values()))[0]
    if kind == "activity" and activities:
        return _deed(view, draw.choice(activities), draw)
    if kind in ("action", "activity", "both") and actions:
        deed = _deed(view, draw.choice(actions), draw)
        return Relative(deed, "while", _setting(view, draw, True)) if kind == "both" else deed
    if kind != "setting" and view.stays:
        return Presence(_who(view, draw.choice(view.stays).actor, draw))
    return _setting(view, draw, False)


def _setting(view: View, draw: Random, simple: bool) -> Setting:
    daylight = [kind for kind in view.settings if kind in world.DAYLIGHTS]
    weather = [kind for kind in view.settings if kind in world.WEATHERS and kind != "clear"]
    if weather and (not daylight or draw.random() < 0.5):
        both = bool(daylight) and not simple and draw.random() < 0.4
        return Setting(draw.choice(daylight) if both else None, draw.choice(weather))
    return Setting(draw.choice(daylight))


def _deed(view: View, event: Event, draw: Random) -> Deed:
    whom = None if event.partner is None else _who(view, event.partner, draw)
    return Deed(event.verb, _who(view, event.actor, draw), whom).ordered()


def _who(view: View, actor: int, draw: Random) -> Who:
    one = view.script.cast[actor]
    if draw.random() < _VAGUE:
        return draw.choice((Who(colour=one.colour), Who(shape=one.shape), Who()))
    return Who(one.colour, one.shape, one.size if draw.random() < _SIZED else None)
