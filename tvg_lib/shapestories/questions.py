"""Which questions are asked of a film.

Candidates are everything that the grammar can say about what happens, at every level, and relations
between two events. From them questions are drawn so that the lengths of the answers come out as
nearly log-uniform as the film allows: first a range of lengths, then a level, then a candidate.

A question is asked only if its answer is a small part of the film and has few moments: what is
nearly everywhere asks nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import log10
from random import Random
from typing import Literal, get_args

import numpy as np

from tvg_lib.shapestories import world
from tvg_lib.shapestories.generator import StoryConfig
from tvg_lib.shapestories.language import (
    ASKED_WEATHERS,
    ORDINALS,
    Deed,
    Meaning,
    Nth,
    Presence,
    Relative,
    Setting,
    Who,
    answer,
    say,
)
from tvg_lib.shapestories.world import Event, Script

Level = Literal["action", "activity", "scene", "relation", "several"]
LEVELS: tuple[Level, ...] = get_args(Level)

MOST_MOMENTS = 5
MOST_COVERED = 0.4  # of the film
BINS_PER_DECADE = 3
_OFTEN = {"action": 3, "activity": 2, "scene": 2, "relation": 3, "several": 2}
_RELATIONS_TRIED = 12  # for every question that is wanted


@dataclass(frozen=True, eq=False)
class Question:
    """A question about a film with its true answer.

    Attributes:
        text: the question.
        meaning: what it says.
        level: of what it asks; "several" where it has more than one answer.
        unseen: whether it names a combination that occurs in test films only.
        moments: (M, 2) seconds, in order.
    """

    text: str
    meaning: Meaning
    level: Level
    unseen: bool
    moments: np.ndarray = field(repr=False)


def ask(script: Script, config: StoryConfig) -> tuple[Question, ...]:
    """The questions about a film: the same script and configuration give the same questions."""
    rng = Random(f"questions/{script.id}/{script.look}")
    shelves: dict[int, dict[Level, list[tuple[Meaning, np.ndarray]]]] = {}
    seen: set[Meaning] = set()
    for meaning, moments in _candidates(script, config, rng):
        if meaning in seen or not _askable(moments, script.duration):
            continue
        seen.add(meaning)
        length = float(np.exp(np.log(moments[:, 1] - moments[:, 0]).mean()))
        shelf = shelves.setdefault(int(log10(max(length, 1.0)) * BINS_PER_DECADE), {})
        shelf.setdefault(_level(meaning, moments), []).append((meaning, moments))
    questions: list[Question] = []
    texts: set[str] = set()
    while shelves and len(questions) < config.questions:
        length = rng.choice(sorted(shelves))
        shelf = shelves[length]
        levels = sorted(shelf)
        level = rng.choices(levels, [_OFTEN[name] for name in levels])[0]
        meaning, moments = shelf[level].pop(rng.randrange(len(shelf[level])))
        if not shelf[level]:
            del shelf[level]
            if not shelf:
                del shelves[length]
        text = say(meaning, rng)
        if text not in texts:
            texts.add(text)
            questions.append(Question(text, meaning, level, unseen(meaning), moments))
    return tuple(questions)


def unseen(meaning: Meaning) -> bool:
    """Whether a meaning joins a colour and shape, or a shape and deed, of test films only."""
    if isinstance(meaning, Nth):
        return unseen(meaning.base)
    if isinstance(meaning, Relative):
        return unseen(meaning.base) or unseen(meaning.other)
    if isinstance(meaning, Setting):
        return False
    held = [(who.colour, who.shape) in world.HELD_OUT_ACTORS for who in _named(meaning)]
    deed = isinstance(meaning, Deed) and (meaning.who.shape, meaning.verb) in world.HELD_OUT_DEEDS
    return any(held) or deed


def _named(meaning: Deed | Presence) -> list[Who]:
    whom = meaning.whom if isinstance(meaning, Deed) else None
    return [meaning.who] if whom is None else [meaning.who, whom]


def _askable(moments: np.ndarray, duration: float) -> bool:
    lengths = moments[:, 1] - moments[:, 0]
    return (
        1 <= len(moments) <= MOST_MOMENTS
        and lengths.min() >= 1
        and lengths.sum() <= MOST_COVERED * duration
        # "The first time" would mean "from the very beginning": known without looking.
        and moments[0, 0] > 0
        and moments[-1, 1] < duration
    )


def _level(meaning: Meaning, moments: np.ndarray) -> Level:
    if len(moments) > 1:
        return "several"
    if isinstance(meaning, Nth | Relative):
        return "relation"
    if isinstance(meaning, Deed):
        return "activity" if meaning.verb in world.ACTIVITIES else "action"
    return "scene"


def _candidates(
    script: Script, config: StoryConfig, rng: Random
) -> Iterator[tuple[Meaning, np.ndarray]]:
    """What can be said about a film, with its answers."""
    bases = list(dict.fromkeys(_simple(script, rng)))
    answers = {base: answer(base, script) for base in bases}
    yield from answers.items()
    for base, moments in answers.items():
        for number in ORDINALS:
            if 2 <= len(moments) <= MOST_MOMENTS and number <= len(moments):
                yield (nth := Nth(number, base)), answer(nth, script)
    deeds = [base for base in bases if isinstance(base, Deed) and len(answers[base]) > 1]
    others = [base for base in bases if not isinstance(base, Presence) and len(answers[base])]
    if not deeds:
        return
    for _ in range(_RELATIONS_TRIED * config.questions):
        base, other = rng.choice(deeds), rng.choice(others)
        relation = (
            "while" if isinstance(other, Setting) else rng.choice(("after", "before", "while"))
        )
        if base == other or (relation != "while" and len(answers[other]) > 1):
            continue  # "after it has left" asks for one leave-taking
        meaning = Relative(base, relation, other)
        moments = answer(meaning, script)
        if 0 < len(moments) < len(answers[base]):  # the context decides
            yield meaning, moments


def _simple(script: Script, rng: Random) -> Iterator[Deed | Presence | Setting]:
    """Meanings without relations."""
    for event in (*script.actions, *script.activities):
        yield _deed(script, event, rng, partial=False)
        if rng.random() < 0.3:
            yield _deed(script, event, rng, partial=True)
    for stay in script.stays:
        yield Presence(_who(script, stay.actor, rng, partial=False))
    for daylight in world.DAYLIGHTS:
        yield Setting(daylight)
    for weather in ASKED_WEATHERS:
        yield Setting(None, weather)
        for daylight in world.DAYLIGHTS:
            yield Setting(daylight, weather)


def _deed(script: Script, event: Event, rng: Random, partial: bool) -> Deed:
    """What an event is; `partial` names one of the actors by its colour or shape only."""
    vague = rng.randrange(1 if event.partner is None else 2) if partial else -1
    who = _who(script, event.actor, rng, vague == 0)
    if event.partner is None:
        return Deed(event.verb, who)
    return Deed(event.verb, who, _who(script, event.partner, rng, vague == 1)).ordered()


def _who(script: Script, actor: int, rng: Random, partial: bool) -> Who:
    """A description that fits one of the cast; `partial` may fit others."""
    one = script.cast[actor]
    if partial:
        return Who(colour=one.colour) if rng.random() < 0.5 else Who(shape=one.shape)
    return name_of(script, actor)


def name_of(script: Script, actor: int) -> Who:
    """The shortest full description that fits this one of the cast alone."""
    one = script.cast[actor]
    like = [
        other for other in script.cast if (other.colour, other.shape) == (one.colour, one.shape)
    ]
    return Who(one.colour, one.shape, one.size if len(like) > 1 else None)
