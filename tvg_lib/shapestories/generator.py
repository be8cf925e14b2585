"""Scripts from seeds: who is on stage when, and what they do.

    1. Scenes: daylight and weather change at times of their own.
    2. Stays: a stage has a few places; actors take turns on each of them.
    3. Activities: stretches of free time of one or two actors, filled with actions of one plan.
    4. Actions: whatever time remains is filled with single actions and pauses.

All lengths are drawn log-uniformly. The cast shares few colours and shapes, so that every event has
neighbours that share its actor or its verb.

A film depends on the seed, the split, the configuration of its length (its ids say the name only)
and the film's number. The generator is `random.Random`, whose streams are the same in every version
of Python, and all times are rounded to tenths of a second: the same seed gives the same bytes of
script on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from random import Random
from typing import Literal, get_args

from tvg_lib.errors import ConfigurationError
from tvg_lib.shapestories import world
from tvg_lib.shapestories.world import Actor, Event, Scene, Script, Stay

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

PLACES = tuple((x, y) for y in (0.36, 0.72) for x in (0.18, 0.5, 0.82))
_KINDS = 5  # colours, and shapes, that the cast of a film is drawn from
_HELD_OUT_SHARE = 0.35  # of the cast of a test film: actors never seen in training


@dataclass(frozen=True)
class StoryConfig:
    """How long films are and how much happens in them.

    Attributes:
        name: part of every film's id.
        duration: fewest and most seconds of a film.
        cast: fewest and most actors.
        places: fewest and most actors on stage at once, at most six.
        stay: fewest and most seconds of a stay.
        scene: fewest and most seconds of one kind of daylight or weather.
        pause: fewest and most seconds between two actions of an actor.
        activity: fewest and most seconds of an activity that is not a bout of one action.
        busy: share of an actor's time that activities may fill.
        questions: most questions about a film.
    """

    name: str
    duration: tuple[int, int]
    cast: tuple[int, int]
    places: tuple[int, int]
    stay: tuple[float, float]
    scene: tuple[float, float]
    pause: tuple[float, float]
    activity: tuple[float, float] = (15.0, 120.0)
    busy: float = 0.3
    questions: int = 8

    def __post_init__(self) -> None:
        for name in ("duration", "cast", "places", "stay", "scene", "pause", "activity"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigurationError(
                    f"StoryConfig.{name} must satisfy 0 < low <= high, found {low}, {high}"
                )
        if self.duration[0] < 20 or self.places[1] > len(PLACES) or self.cast[0] < 2:
            raise ConfigurationError(
                f"a film lasts 20 s or more, has two actors or more and at most {len(PLACES)} "
                f"places, found {self!r}"
            )
        if self.cast[0] < self.places[1]:
            raise ConfigurationError("a cast is at least as large as the stage has places")
        if not 0 <= self.busy <= 1 or self.questions < 1:
            raise ConfigurationError("busy lies in [0, 1] and a film has a question or more")


SHORT = StoryConfig(
    "short",
    duration=(30, 150),
    cast=(5, 6),
    places=(3, 4),
    stay=(12, 100),
    scene=(8, 80),
    pause=(6, 45),
    activity=(15, 60),
    questions=8,
)
MEDIUM = StoryConfig(
    "medium",
    duration=(300, 600),
    cast=(7, 10),
    places=(3, 4),
    stay=(20, 250),
    scene=(20, 200),
    pause=(6, 50),
    questions=32,
)
LONG = StoryConfig(
    "long",
    duration=(1200, 3600),
    cast=(10, 14),
    places=(3, 4),
    stay=(30, 600),
    scene=(60, 1000),
    pause=(6, 60),
    questions=64,
)


def write_script(config: StoryConfig, split: Split, number: int, seed: int = 0) -> Script:
    """One film of a split.

    Args:
        config: its length.
        split: test films have actors and deeds that no other split has.
        number: of the film in its split.
        seed: of the world.

    Raises:
        ConfigurationError: there is no such split.
    """
    if split not in SPLITS:
        raise ConfigurationError(f"the splits are {', '.join(SPLITS)}, found {split!r}")
    rng = Random(f"{seed}/{config.name}/{split}/{number}")
    return _Writer(config, split == "test", rng).script(f"{config.name}-{split}-{number:04d}")


def _log_uniform(rng: Random, low: float, high: float) -> float:
    return exp(rng.uniform(log(low), log(high)))


def _tenths(seconds: float) -> float:
    return round(seconds, 1)


@dataclass
class _Diary:
    """When an actor is taken, and whether it then stands in its place."""

    entries: list[tuple[float, float, bool]]

    def free(self, start: float, end: float) -> bool:
        return all(end <= first or last <= start for first, last, _ in self.entries)

    def still(self, start: float, end: float) -> bool:
        """Whether the actor does nothing but stand, or act in its place."""
        return all(at_home or end <= a or b <= start for a, b, at_home in self.entries)

    def note(self, start: float, end: float, at_home: bool) -> None:
        self.entries.append((start, end, at_home))

    def gaps(self, start: float, end: float) -> list[tuple[float, float]]:
        """Free stretches between two times, in order."""
        found, at = [], start
        for first, last, _ in sorted(self.entries):
            if last <= start or first >= end:
                continue
            if first > at:
                found.append((at, first))
            at = max(at, last)
        if end > at:
            found.append((at, end))
        return found


class _Writer:
    """Writes one script; the order of the draws is part of what a seed means."""

    def __init__(self, config: StoryConfig, unseen: bool, rng: Random) -> None:
        self.config, self.unseen, self.rng = config, unseen, rng
        self.duration = float(rng.randint(*config.duration))
        self.cast = self._cast()
        self.diaries = [_Diary([]) for _ in self.cast]
        self.stays: list[Stay] = []
        self.actions: list[Event] = []
        self.activities: list[Event] = []

    def script(self, film: str) -> Script:
        daylights = self._scenes(world.DAYLIGHTS)
        weathers = self._scenes(world.WEATHERS)
        self._fill_stage()
        for stay in self.stays:
            self._plan_activities(stay)
        for stay in self.stays:
            self._fill_time(stay)

        def order(event: Event) -> tuple[float, float, int]:
            return event.start, event.end, event.actor

        return Script(
            id=film,
            duration=self.duration,
            look=self.rng.randrange(2**31),
            cast=tuple(self.cast),
            stays=tuple(self.stays),
            actions=tuple(sorted(self.actions, key=order)),
            activities=tuple(sorted(self.activities, key=order)),
            daylights=daylights,
            weathers=weathers,
        )

    # --- the stage --------------------------------------------------------------------------------

    def _cast(self) -> list[Actor]:
        """Different actors of five colours and five shapes; some differ in size only."""
        rng = self.rng
        count = rng.randint(*self.config.cast)
        colours, shapes = (rng.sample(kinds, _KINDS) for kinds in (world.COLOURS, world.SHAPES))
        cast: list[Actor] = []
        while len(cast) < count:
            actor = Actor(rng.choice(colours), rng.choice(shapes), rng.choice(world.SIZES))
            if self.unseen and rng.random() < _HELD_OUT_SHARE:
                actor = Actor(*rng.choice(sorted(world.HELD_OUT_ACTORS)), actor.size)
            if actor not in cast and (self.unseen or not actor.held_out):
                cast.append(actor)
        return cast

    def _scenes(self, kinds: Sequence[str]) -> tuple[Scene, ...]:
        scenes: list[Scene] = []
        at = 0.0
        while at < self.duration:
            length = _log_uniform(self.rng, *self.config.scene)
            end = _tenths(min(at + length, self.duration))
            if self.duration - end < self.config.scene[0]:
                end = self.duration
            kind = self.rng.choice([k for k in kinds if not scenes or k != scenes[-1].kind])
            scenes.append(Scene(kind, at, end))
            at = end
        return tuple(scenes)

    def _fill_stage(self) -> None:
        """Stays on every place, one after the other; an actor is in one place at a time."""
        rng, low = self.rng, self.config.stay[0]
        for x, y in rng.sample(PLACES, rng.randint(*self.config.places)):
            at = 0.0 if rng.random() < 0.7 else _tenths(rng.uniform(1, low))
            while at < self.duration - low / 2:
                end = _tenths(min(at + _log_uniform(rng, *self.config.stay), self.duration))
                if self.duration - end < low / 2:
                    end = self.duration
                ready = [
                    i
                    for i in range(len(self.cast))
                    if all(
                        s.end + 1 <= at or end + 1 <= s.start for s in self.stays if s.actor == i
                    )
                ]
                if ready:
                    x_now = round(x + rng.uniform(-0.06, 0.06), 3)
                    y_now = round(y + rng.uniform(-0.08, 0.08), 3)
                    self._enter_and_leave(Stay(rng.choice(ready), at, end, x_now, y_now))
                at = _tenths(end + rng.uniform(1, 6))
        self.stays.sort(key=lambda stay: (stay.start, stay.actor))

    def _enter_and_leave(self, stay: Stay) -> None:
        self.stays.append(stay)
        if stay.start > 0:
            end = _tenths(stay.start + _log_uniform(self.rng, 1.5, 4))
            self._note(Event("enter", stay.actor, None, stay.start, end))
        if stay.end < self.duration:
            start = _tenths(stay.end - _log_uniform(self.rng, 1.5, 4))
            self._note(Event("leave", stay.actor, None, start, stay.end))

    # --- what happens -----------------------------------------------------------------------------

    def _note(self, event: Event) -> None:
        """Write an action down, in the diaries of all who take part."""
        self.actions.append(event)
        self.diaries[event.actor].note(event.start, event.end, event.verb in world.SOLO)
        if event.partner is not None:
            # Who is followed walks; all others who are acted upon stand still.
            self.diaries[event.partner].note(event.start, event.end, event.verb != "follow")

    def _present(self, actor: int, start: float, end: float) -> bool:
        return any(s.actor == actor and s.start <= start and end <= s.end for s in self.stays)

    def _partners(self, actor: int, verb: str, start: float, end: float) -> list[int]:
        """Who may be bumped into, circled, followed or hidden behind just then."""
        sizes = world.SIZES
        found = []
        for other, diary in enumerate(self.diaries):
            if other == actor or not self._present(other, start, end):
                continue
            small = sizes.index(self.cast[other].size) < sizes.index(self.cast[actor].size)
            if verb == "hide" and small:
                continue
            ready = diary.free if verb == "follow" else diary.still
            if ready(start, end):
                found.append(other)
        return found

    def _fill_time(self, stay: Stay) -> None:
        """Single actions in what is left of a stay."""
        rng = self.rng
        for low, high in self.diaries[stay.actor].gaps(stay.start, stay.end):
            at = low + _log_uniform(rng, *self.config.pause) * rng.random()
            while True:
                start, end = _tenths(at), _tenths(at + _log_uniform(rng, 1, 8))
                if end > high - 0.3:
                    break
                self._act(stay.actor, start, end)
                at = end + _log_uniform(rng, *self.config.pause)

    def _act(self, actor: int, start: float, end: float) -> None:
        """One action that is possible just then, if there is one."""
        if not self.diaries[actor].free(start, end):  # somebody else has come for this actor
            return
        alone = [verb for verb in world.SOLO if self.cast[actor].may(verb, self.unseen)]
        pairs = [
            (verb, partner)
            for verb in world.TOGETHER
            if end - start >= 1.5 and self.cast[actor].may(verb, self.unseen)
            for partner in self._partners(actor, verb, start, end)
        ]
        if pairs and self.rng.random() < 0.5:
            self._note(Event(*self._pair(pairs, actor), start, end))
        else:
            self._note(Event(self.rng.choice(alone), actor, None, start, end))

    def _pair(self, pairs: Sequence[tuple[str, int]], actor: int) -> tuple[str, int, int]:
        """A verb first, then a partner: verbs that suit many partners are not more frequent."""
        verb = self.rng.choice(sorted({verb for verb, _ in pairs}))
        return verb, actor, self.rng.choice([partner for v, partner in pairs if v == verb])

    # --- activities -------------------------------------------------------------------------------

    def _plan_activities(self, stay: Stay) -> None:
        rng, config = self.rng, self.config
        budget = config.busy * (stay.end - stay.start)
        for _ in range(12):
            bout = rng.random() < 0.3
            length = _log_uniform(rng, 8, 15) if bout else _log_uniform(rng, *config.activity)
            if length > budget:
                continue
            gaps = [
                (low, high)
                for low, high in self.diaries[stay.actor].gaps(stay.start, stay.end)
                if high - low > length + 1
            ]
            if not gaps:
                continue
            low, high = rng.choice(gaps)
            start = _tenths(rng.uniform(low + 0.5, high - length - 0.5))
            end = _tenths(start + length)
            if self._perform(stay.actor, start, end, bout):
                budget -= length

    def _perform(self, actor: int, start: float, end: float, bout: bool) -> bool:
        """Plan one activity; whether there was one to plan."""
        rng = self.rng
        others = [
            other
            for other, diary in enumerate(self.diaries)
            if other != actor and self._present(other, start, end) and diary.free(start, end)
        ]
        if bout:
            verbs = [f"keep-{v}" for v in world.REPEATED if self.cast[actor].may(v, self.unseen)]
        elif others and rng.random() < 0.75:
            verbs = list(world.PAIR_ACTIVITIES)
        else:
            verbs = ["perform"]
        verb = rng.choice(verbs)
        partner = rng.choice(others) if verb in world.PAIR_ACTIVITIES else None
        steps = self._steps(verb, actor, partner, start, end)
        if not steps:
            return False
        self.activities.append(Event(verb, actor, partner, start, end))
        self.actions += steps
        for who in (actor, partner):
            if who is not None:
                self.diaries[who].note(start, end, False)
        return True

    def _steps(
        self, verb: str, actor: int, partner: int | None, start: float, end: float
    ) -> list[Event]:
        """The actions of an activity with short pauses between them, from its start to its end."""
        possible = [
            (v, who, whom)
            for v, who, whom in _plan(verb, actor, partner)
            if self.cast[who].may(v, self.unseen) and self._can_hide(v, who, whom)
        ]
        single = verb == "chase" or verb.startswith("keep")
        if len(possible) < (1 if single else 2):
            return []
        if verb == "seek" and all(v != "hide" for v, _, _ in possible):
            return []
        rng = self.rng
        longest = 3 if verb.startswith("keep") else 5
        lengths, pauses = [rng.uniform(1.5, longest)], []
        while sum(lengths) + sum(pauses) < end - start:
            pauses.append(rng.uniform(0.3, 1))
            lengths.append(rng.uniform(1.5, longest))
        scale = (end - start) / (sum(lengths) + sum(pauses))
        steps: list[Event] = []
        at = start
        last = None
        for length, pause in zip(lengths, [*pauses, 0.0], strict=True):
            last = rng.choice([step for step in possible if step != last] or possible)
            stop = at + length * scale
            steps.append(Event(*last, _tenths(at), _tenths(stop)))
            at = stop + pause * scale
        return steps

    def _can_hide(self, verb: str, actor: int, partner: int | None) -> bool:
        """Nobody hides behind somebody smaller."""
        if verb != "hide" or partner is None:
            return True
        sizes = world.SIZES
        return sizes.index(self.cast[partner].size) >= sizes.index(self.cast[actor].size)


def _plan(verb: str, actor: int, partner: int | None) -> list[tuple[str, int, int | None]]:
    """The actions an activity is made of: verb, who, whom."""
    if partner is None:
        verbs = world.SOLO if verb == "perform" else (verb.removeprefix("keep-"),)
        return [(v, actor, None) for v in verbs]
    pairs = [(actor, partner), (partner, actor)]
    if verb == "dance":
        return [(v, who, None) for who, _ in pairs for v in ("spin", "jump")]
    if verb == "chase":
        return [("follow", actor, partner)]
    verbs = ("bump",) if verb == "fight" else ("hide", "circle")
    return [(v, who, whom) for v in verbs for who, whom in pairs]
