"""Questions in English about a script, what they mean, and their answers.

A *meaning* is what a question says, without the words; it is answered by looking it up in a script.
`say` puts a meaning into one of many wordings, `parse` is its inverse:

    text = say(meaning, rng)    parse(text) == meaning    answer(meaning, script) -> moments

    Deed      "the big red circle hops", "something blue goes round a star", "they dance"
    Presence  "the green cross is on stage"
    Setting   "it snows", "it rains at night"
    Nth       "the second time the red circle jumps", "the last time it snows"
    Relative  "the star spins after the square has left", "while it snows, the circle jumps"

Words that mean the same are listed once, below; a word has one meaning only, which is what makes
`parse` possible and every question answerable.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal

import numpy as np

from tvg_lib.errors import DataError
from tvg_lib.shapestories import world
from tvg_lib.shapestories.world import Actor, Event, Script

COLOUR_WORDS = {
    "red": ("red", "scarlet", "crimson"),
    "orange": ("orange", "amber"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "purple": ("purple", "violet"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "asterisk"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large")}

# One actor: present tense, participle after "has". More than one wording each.
VERB_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "enter": (("enters", "entered"), ("comes in", "come in"), ("arrives", "arrived")),
    "leave": (("leaves", "left"), ("goes away", "gone away"), ("exits", "exited")),
    "jump": (("jumps", "jumped"), ("hops", "hopped"), ("leaps", "leapt")),
    "spin": (("spins", "spun"), ("rotates", "rotated"), ("twirls", "twirled")),
    "grow": (("grows", "grown"), ("swells", "swollen"), ("gets bigger", "got bigger")),
    "shrink": (("shrinks", "shrunk"), ("dwindles", "dwindled"), ("gets smaller", "got smaller")),
    "blink": (("blinks", "blinked"), ("flashes", "flashed"), ("flickers", "flickered")),
    "bump": (("bumps into", "bumped into"), ("hits", "hit"), ("knocks against", "knocked against")),
    "circle": (("circles round", "circled round"), ("orbits", "orbited")),
    "follow": (("follows", "followed"), ("trails", "trailed"), ("tails", "tailed")),
    "hide": (("hides behind", "hidden behind"), ("ducks behind", "ducked behind")),
    "keep-jump": (("keeps jumping", "kept jumping"), ("keeps hopping", "kept hopping")),
    "keep-spin": (("keeps spinning", "kept spinning"), ("keeps rotating", "kept rotating")),
    "keep-blink": (("keeps blinking", "kept blinking"), ("keeps flashing", "kept flashing")),
    "perform": (("performs", "performed"), ("shows its tricks", "shown its tricks")),
    "chase": (("chases", "chased"), ("hunts", "hunted")),
    # Two actors as one subject: "the circle and the star dance".
    "dance": (("dance", "danced"), ("waltz", "waltzed")),
    "fight": (("fight", "fought"), ("quarrel", "quarrelled")),
    "seek": (("play hide and seek", "played hide and seek"),),
}
SETTING_WORDS = {
    "rain": ("it rains", "it pours", "rain falls"),
    "snow": ("it snows", "snow falls"),
    "fog": ("it is foggy", "fog hangs over the stage"),
    "storm": ("a storm rages", "it storms"),
    "day": ("it is day", "it is daytime"),
    "sunset": ("the sun sets", "it is sunset"),
    "night": ("it is night", "it is dark"),
    "dawn": ("it is dawn", "the day breaks"),
}
AT_WORDS = {
    "day": ("by day", "in daylight"),
    "sunset": ("at sunset", "at dusk"),
    "night": ("at night", "in the dark"),
    "dawn": ("at dawn", "at daybreak"),
}
PRESENT_WORDS = ("is on stage", "is in the picture", "is there")
ORDINALS = {1: "first", 2: "second", 3: "third", 4: "fourth", -1: "last"}
ASKED_WEATHERS = tuple(kind for kind in world.WEATHERS if kind != "clear")


# --- meanings -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Who:
    """A description of an actor; None where it says nothing."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None

    def fits(self, actor: Actor) -> bool:
        """Whether it describes this actor."""
        return (
            self.colour in (None, actor.colour)
            and self.shape in (None, actor.shape)
            and self.size in (None, actor.size)
        )


@dataclass(frozen=True, slots=True)
class Deed:
    """Somebody does something, alone, to or with another: an action or an activity."""

    verb: str
    who: Who
    whom: Who | None = None

    def ordered(self) -> "Deed":
        """Of two equal ways to mean the same ("A and B dance", "B and A dance"), one."""
        if self.whom is None or self.verb not in world.SYMMETRIC:
            return self
        first, second = sorted((self.who, self.whom), key=repr)
        return Deed(self.verb, first, second)


@dataclass(frozen=True, slots=True)
class Presence:
    """Somebody is on stage."""

    who: Who


@dataclass(frozen=True, slots=True)
class Setting:
    """Daylight, weather, or both at once."""

    daylight: str | None = None
    weather: str | None = None


@dataclass(frozen=True, slots=True)
class Nth:
    """One of several times: the first is 1, the last -1."""

    number: int
    base: Deed | Presence | Setting


@dataclass(frozen=True, slots=True)
class Relative:
    """Those times of `base` that stand in a relation to `other`."""

    base: Deed
    relation: Literal["after", "before", "while"]
    other: Deed | Setting


Meaning = Deed | Presence | Setting | Nth | Relative


# --- answers --------------------------------------------------------------------------------------


def answer(meaning: Meaning, script: Script) -> np.ndarray:
    """(M, 2) seconds of all moments that a meaning describes, in order; what overlaps is joined.

    M = 0 where nothing in the film fits.
    """
    if isinstance(meaning, Nth):
        times = answer(meaning.base, script)
        index = meaning.number - 1 if meaning.number > 0 else -1
        return times[[index]] if len(times) >= abs(meaning.number) else times[:0]
    if isinstance(meaning, Relative):
        times, other = answer(meaning.base, script), answer(meaning.other, script)
        return times[_related(times, meaning.relation, other)]
    if isinstance(meaning, Setting):
        return _both(_scenes(script, meaning.daylight), _scenes(script, meaning.weather))
    if isinstance(meaning, Presence):
        stays = [(s.start, s.end) for s in script.stays if meaning.who.fits(script.cast[s.actor])]
        return _joined(stays)
    found = [e for e in script.by_verb[meaning.verb] if describes(meaning, script, e)]
    return _joined([(event.start, event.end) for event in found])


def describes(deed: Deed, script: Script, event: Event) -> bool:
    """Whether the actors of an event of a deed's verb are those that the deed names."""
    actor = script.cast[event.actor]
    partner = None if event.partner is None else script.cast[event.partner]
    if partner is None or deed.whom is None:
        return partner is None and deed.whom is None and deed.who.fits(actor)
    if deed.who.fits(actor) and deed.whom.fits(partner):
        return True
    return deed.verb in world.SYMMETRIC and deed.who.fits(partner) and deed.whom.fits(actor)


def _joined(times: Sequence[tuple[float, float]]) -> np.ndarray:
    joined: list[list[float]] = []
    for start, end in sorted(times):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return np.array(joined, dtype=np.float64).reshape(-1, 2)


def _scenes(script: Script, kind: str | None) -> np.ndarray:
    if kind is None:
        return np.array([[0.0, script.duration]])
    scenes = script.daylights if kind in world.DAYLIGHTS else script.weathers
    return _joined([(scene.start, scene.end) for scene in scenes if scene.kind == kind])


def _both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two lists of intervals overlap."""
    start = np.maximum(a[:, None, 0], b[None, :, 0]).ravel()
    end = np.minimum(a[:, None, 1], b[None, :, 1]).ravel()
    keep = start < end
    return _joined(list(zip(start[keep].tolist(), end[keep].tolist(), strict=True)))


def _related(times: np.ndarray, relation: str, other: np.ndarray) -> np.ndarray:
    """(M,) which times come after the first `other` has ended, end before the last of them begins,
    or lie, by half or more, in some of them."""
    if not len(other):
        return np.zeros(len(times), bool)
    if relation == "after":
        return times[:, 0] >= other[:, 1].min()
    if relation == "before":
        return times[:, 1] <= other[:, 0].max()
    start = np.maximum(times[:, None, 0], other[None, :, 0])
    end = np.minimum(times[:, None, 1], other[None, :, 1])
    return (end - start).clip(min=0).sum(1) >= 0.5 * (times[:, 1] - times[:, 0])


# --- from meanings to words -----------------------------------------------------------------------


def say(meaning: Meaning, rng: Random | None = None) -> str:
    """A wording of a meaning: one of many, or the plainest without a generator."""
    rng = _Plain() if rng is None else rng
    if isinstance(meaning, Nth):
        clause, ordinal = say(meaning.base, rng), ORDINALS[meaning.number]
        if rng.random() < 0.6:
            return f"the {ordinal} time {clause}"
        return f"{clause} for the {ordinal} time"
    if isinstance(meaning, Relative):
        return _say_relative(meaning, rng)
    if isinstance(meaning, Presence):
        return f"{_name(meaning.who, rng)} {rng.choice(PRESENT_WORDS)}"
    if isinstance(meaning, Setting):
        if meaning.weather is None:
            return rng.choice(SETTING_WORDS[meaning.daylight])
        weather = rng.choice(SETTING_WORDS[meaning.weather])
        if meaning.daylight is None:
            return weather
        return f"{weather} {rng.choice(AT_WORDS[meaning.daylight])}"
    return _clause(meaning, rng.choice(VERB_WORDS[meaning.verb])[0], rng)


class _Plain(Random):
    """The first of every choice."""

    def random(self) -> float:
        return 0.0

    def choice(self, seq: Sequence) -> object:  # type: ignore[override]
        return seq[0]


def _clause(deed: Deed, verb: str, rng: Random) -> str:
    who = _name(deed.who, rng)
    if deed.whom is None:
        return f"{who} {verb}"
    whom = _name(deed.whom, rng)
    if deed.verb in world.SYMMETRIC:
        if rng.random() < 0.5 and not isinstance(rng, _Plain):
            who, whom = whom, who
        return f"{who} and {whom} {verb}"
    return f"{who} {verb} {whom}"


def _say_relative(meaning: Relative, rng: Random) -> str:
    base = say(meaning.base, rng)
    if meaning.relation == "while":
        if isinstance(meaning.other, Setting) and meaning.other.weather is None:
            return f"{base} {rng.choice(AT_WORDS[meaning.other.daylight])}"
        link, other = "while", say(meaning.other, rng)
    else:
        link = meaning.relation
        verb = rng.choice(VERB_WORDS[meaning.other.verb])
        if link == "after" and rng.random() < 0.5 and not isinstance(rng, _Plain):
            has = "have" if meaning.other.verb in world.SYMMETRIC else "has"
            other = _clause(meaning.other, f"{has} {verb[1]}", rng)
        else:
            other = _clause(meaning.other, verb[0], rng)
    if rng.random() < 0.6:
        return f"{base} {link} {other}"
    return f"{link} {other}, {base}"


def _name(who: Who, rng: Random) -> str:
    """A noun phrase. One that may fit several actors says "a" or "something"."""
    adjectives = [
        rng.choice(words[value])
        for words, value in ((SIZE_WORDS, who.size), (COLOUR_WORDS, who.colour))
        if value is not None
    ]
    if who.shape is None:
        return " ".join(["something", *adjectives])
    noun = rng.choice(SHAPE_WORDS[who.shape])
    if who.colour is not None:
        return " ".join(["the", *adjectives, noun])
    first = (adjectives or [noun])[0]
    article = "an" if first[0] in "aeiou" else "a"
    return " ".join([article, *adjectives, noun])


# --- from words to meanings -----------------------------------------------------------------------

_COLOUR_OF = {word: colour for colour, words in COLOUR_WORDS.items() for word in words}
_SHAPE_OF = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_VERB_OF = {
    form: verb
    for verb, wordings in VERB_WORDS.items()
    for present, past in wordings
    for form in (present, f"has {past}", f"have {past}")
}
_SETTING_OF = {wording: kind for kind, wordings in SETTING_WORDS.items() for wording in wordings}
_AT_OF = {wording: kind for kind, wordings in AT_WORDS.items() for wording in wordings}
_NUMBER_OF = {word: number for number, word in ORDINALS.items()}


def _any_of(wordings: Sequence[str]) -> str:
    """A pattern of whole wordings, longer ones first."""
    return "|".join(map(re.escape, sorted(wordings, key=lambda w: (-len(w), w))))


_NAME = (
    rf"(?:(?:the|a|an|something)(?: (?:{_any_of(tuple(_SIZE_OF))}))?"
    rf"(?: (?:{_any_of(tuple(_COLOUR_OF))}))?(?: (?:{_any_of(tuple(_SHAPE_OF))}))?)"
)
_CLAUSE = re.compile(
    rf"(?P<who>{_NAME})(?: and (?P<also>{_NAME}))? (?P<verb>{_any_of(tuple(_VERB_OF))})"
    rf"(?: (?P<whom>{_NAME}))?"
)
_PRESENT = re.compile(rf"(?P<who>{_NAME}) (?:{_any_of(PRESENT_WORDS)})")
_WEATHER = re.compile(
    rf"(?P<kind>{_any_of(tuple(_SETTING_OF))})(?: (?P<at>{_any_of(tuple(_AT_OF))}))?"
)
_NTH = (
    re.compile(rf"the (?P<n>{_any_of(tuple(_NUMBER_OF))}) time (?P<base>.+)"),
    re.compile(rf"(?P<base>.+) for the (?P<n>{_any_of(tuple(_NUMBER_OF))}) time"),
)
_LINKED = (
    re.compile(r"(?P<link>after|before|while) (?P<other>[^,]+), (?P<base>.+)"),
    re.compile(r"(?P<base>.+) (?P<link>after|before|while) (?P<other>.+)"),
)
_AT = re.compile(rf"(?P<base>.+) (?P<at>{_any_of(tuple(_AT_OF))})")


@lru_cache(maxsize=4096)
def parse(text: str) -> Meaning:
    """What a question says, whatever its wording.

    Raises:
        DataError: the grammar has no such sentence.
    """
    sentence = " ".join(text.lower().strip(" .?!").split())
    for pattern in _NTH:
        if (match := pattern.fullmatch(sentence)) and (base := _simple(match["base"])):
            return Nth(_NUMBER_OF[match["n"]], base)
    for pattern in _LINKED:
        if match := pattern.fullmatch(sentence):
            base, other = _simple(match["base"]), _simple(match["other"])
            if isinstance(base, Deed) and isinstance(other, Deed | Setting):
                return Relative(base, match["link"], other)
    if found := _simple(sentence):
        return found
    if (match := _AT.fullmatch(sentence)) and isinstance(base := _simple(match["base"]), Deed):
        return Relative(base, "while", Setting(daylight=_AT_OF[match["at"]]))
    raise DataError(
        f"{text!r} is no sentence of ShapeStories; one is {say(Deed('jump', Who('red', 'star')))!r}"
    )


def _simple(sentence: str) -> Deed | Presence | Setting | None:
    if match := _WEATHER.fullmatch(sentence):
        kind, at = _SETTING_OF[match["kind"]], match["at"]
        if kind in world.DAYLIGHTS:
            return None if at else Setting(daylight=kind)
        return Setting(_AT_OF[at] if at else None, kind)
    if match := _PRESENT.fullmatch(sentence):
        return Presence(_who(match["who"]))
    if match := _CLAUSE.fullmatch(sentence):
        verb = _VERB_OF[match["verb"]]
        first, also, whom = match["who"], match["also"], match["whom"]
        pair = verb in world.TOGETHER or verb in world.PAIR_ACTIVITIES
        second = also if verb in world.SYMMETRIC else whom
        if (second is not None) == pair and (also is None or whom is None):
            return Deed(verb, _who(first), _who(second) if second else None).ordered()
    return None


def _who(phrase: str) -> Who:
    words = phrase.split()
    return Who(
        colour=next((_COLOUR_OF[w] for w in words if w in _COLOUR_OF), None),
        shape=next((_SHAPE_OF[w] for w in words if w in _SHAPE_OF), None),
        size=next((_SIZE_OF[w] for w in words if w in _SIZE_OF), None),
    )


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Every word of the grammar, in alphabetical order."""
    phrases: list[str] = ["the a an something and time for after before while has have"]
    for table in (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, SETTING_WORDS, AT_WORDS):
        phrases += [wording for wordings in table.values() for wording in wordings]
    phrases += [form for wordings in VERB_WORDS.values() for pair in wordings for form in pair]
    phrases += [*PRESENT_WORDS, *ORDINALS.values()]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
