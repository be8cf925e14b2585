"""What a ShapeStories film is made of, and the script that says what happens in it and when.

A script is the whole truth about a film: pictures are drawn from it (`render`), questions and their
answers are read off it (`language`). It holds no random numbers, only what was drawn from them, so
the same script gives the same film on every machine.

    level      verbs                                                          lasts
    action     enter, leave, jump, spin, grow, shrink, blink;                 1-8 s
               bump into, circle, follow, hide behind another actor
    activity   keep jumping / spinning / blinking, perform, dance, fight,     8-120 s
               chase, play hide and seek: several actions of the same actors
    stay       an actor is in the picture, from its entrance to its exit      seconds to minutes
    scene      day, night, dawn, sunset; rain, snow, fog, storm               seconds to minutes
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property

from tvg_lib.errors import DataError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = ("small", "big")

SOLO = ("jump", "spin", "grow", "shrink", "blink")
TOGETHER = ("bump", "circle", "follow", "hide")
PASSAGES = ("enter", "leave")
ACTIONS = (*PASSAGES, *SOLO, *TOGETHER)

REPEATED = ("jump", "spin", "blink")  # what an actor may keep doing
SOLO_ACTIVITIES = (*(f"keep-{action}" for action in REPEATED), "perform")
PAIR_ACTIVITIES = ("dance", "fight", "chase", "seek")
ACTIVITIES = (*SOLO_ACTIVITIES, *PAIR_ACTIVITIES)
SYMMETRIC = ("dance", "fight", "seek")  # "A and B dance" says the same as "B and A dance"

DAYLIGHTS = ("day", "sunset", "night", "dawn")
WEATHERS = ("clear", "rain", "snow", "fog", "storm")

# Combinations that occur in test films only. Every colour, shape and action is known from training.
HELD_OUT_ACTORS = frozenset((COLOURS[i], SHAPES[(i + 2) % 6]) for i in range(6))
HELD_OUT_DEEDS = frozenset(
    {("circle", "blink"), ("square", "spin"), ("triangle", "grow"), ("star", "jump")}
    | {("cross", "circle"), ("diamond", "bump"), ("star", "follow"), ("circle", "hide")}
)


@dataclass(frozen=True, slots=True)
class Actor:
    """A coloured shape of one of two sizes."""

    colour: str
    shape: str
    size: str

    @property
    def held_out(self) -> bool:
        """Whether this colour and shape come together in test films only."""
        return (self.colour, self.shape) in HELD_OUT_ACTORS

    def may(self, action: str, unseen: bool) -> bool:
        """Whether this actor may do an action; some shapes do some actions in test films only."""
        return unseen or (self.shape, action) not in HELD_OUT_DEEDS


@dataclass(frozen=True, slots=True)
class Event:
    """Somebody does something for some seconds: an action or an activity.

    Attributes:
        verb: of `ACTIONS` or `ACTIVITIES`.
        actor: who does it, an index into the cast.
        partner: whom it is done to or with; None where nobody else takes part.
        start, end: seconds, in tenths.
    """

    verb: str
    actor: int
    partner: int | None
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Stay:
    """An actor is in the picture, at its own place.

    Attributes:
        actor: an index into the cast.
        start, end: seconds, in tenths; from the entrance to the exit, or the edge of the film.
        x, y: its place, as shares of the picture; y grows downwards.
    """

    actor: int
    start: float
    end: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One kind of daylight, or of weather, for some seconds."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Script:
    """Everything that happens in a film.

    Attributes:
        id: of the film.
        duration: seconds, a whole number.
        look: seed of what has no meaning: the shape of the hills, the noise.
        cast: the actors; all different.
        stays, actions, activities: in order of their start.
        daylights, weathers: each without a gap from 0 to the duration.
    """

    id: str
    duration: float
    look: int
    cast: tuple[Actor, ...]
    stays: tuple[Stay, ...]
    actions: tuple[Event, ...]
    activities: tuple[Event, ...]
    daylights: tuple[Scene, ...]
    weathers: tuple[Scene, ...]

    def to_json(self) -> str:
        """One line; equal scripts give equal text."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Script":
        """The script that `to_json` wrote.

        Raises:
            DataError: the text is no script.
        """
        try:
            fields = json.loads(text)
            kinds = {"cast": Actor, "stays": Stay, "actions": Event, "activities": Event}
            kinds |= {"daylights": Scene, "weathers": Scene}
            made = {key: tuple(kind(**item) for item in fields[key]) for key, kind in kinds.items()}
            return cls(**(fields | made))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"not a script: {error!r}, found {text[:60]!r}") from error

    @cached_property
    def by_verb(self) -> dict[str, tuple[Event, ...]]:
        """Actions and activities of every verb, in order of their start."""
        events = (*self.actions, *self.activities)
        return {
            verb: tuple(event for event in events if event.verb == verb)
            for verb in (*ACTIONS, *ACTIVITIES)
        }

    def __repr__(self) -> str:
        return (
            f"Script({self.id}: {self.duration:.0f} s, {len(self.cast)} actors, "
            f"{len(self.actions)} actions, {len(self.activities)} activities)"
        )
