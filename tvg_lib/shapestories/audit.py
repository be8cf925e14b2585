"""Whether the benchmark can be cheated, and how hard it is.

    length prior    windows that hit most training moments                `baselines.MomentPrior`
    query only      the same, from the training questions most like this one
    script oracle   reads the question and looks the answer up in the script
    best clip       the clip most like the question lies inside an answer

The first two see no video: what they reach is bias. The oracle shows that every question has the
answer it is said to have. The last is what the encoder alone can do.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tvg_lib.baselines import MomentPrior, similarity
from tvg_lib.data.dataset import GroundingDataset, Query
from tvg_lib.decoding import Prediction
from tvg_lib.errors import DataError
from tvg_lib.metrics import Estimate, MetricReport, bootstrap
from tvg_lib.shapestories.dataset import level_of
from tvg_lib.shapestories.language import Deed, Meaning, Nth, Presence, Relative, answer, parse
from tvg_lib.shapestories.questions import LEVELS, unseen
from tvg_lib.shapestories.world import Script

SEEN = ("known combinations", "unseen combinations")  # of words, in training films


def shape_of(text: str) -> tuple:
    """What a question asks, whoever acts: the verb, the ordinal, the relation, the setting."""
    return _shape(parse(text))


def _shape(meaning: Meaning) -> tuple:
    if isinstance(meaning, Nth):
        return ("nth", meaning.number, *_shape(meaning.base))
    if isinstance(meaning, Relative):
        return (meaning.relation, *_shape(meaning.base))
    if isinstance(meaning, Deed):
        return ("deed", meaning.verb)
    if isinstance(meaning, Presence):
        return ("presence",)
    return ("setting", meaning.daylight is not None, meaning.weather is not None)


@dataclass(frozen=True)
class QueryOnly:
    """A predictor that reads the question and sees no video.

    It knows, from the training set, where the answers to questions of the same shape (the same
    verb, ordinal and relation, whoever acts) mostly are; for shapes it has met too rarely it falls
    back on the prior of all.

    Attributes:
        priors: by shape.
        everywhere: of all questions.
    """

    priors: Mapping[tuple, MomentPrior] = field(repr=False)
    everywhere: MomentPrior = field(repr=False)

    @classmethod
    def fitted(cls, dataset: GroundingDataset, fewest: int = 8) -> "QueryOnly":
        """Learn from a data set; shapes with fewer than `fewest` questions are left out."""
        groups: dict[tuple, list[Query]] = {}
        for query in dataset.queries:
            groups.setdefault(shape_of(query.text), []).append(query)
        priors = {
            shape: MomentPrior.fitted(replace(dataset, queries=tuple(queries)))
            for shape, queries in groups.items()
            if len(queries) >= fewest
        }
        return cls(priors, MomentPrior.fitted(dataset))

    def predict(self, dataset: GroundingDataset) -> list[Prediction]:
        """Ranked moments of every query; no feature is read."""
        groups: dict[tuple, list[Query]] = {}
        for query in dataset.queries:
            groups.setdefault(shape_of(query.text), []).append(query)
        answers = {
            prediction.query_id: prediction
            for shape, queries in groups.items()
            for prediction in self.priors.get(shape, self.everywhere).predict(
                replace(dataset, queries=tuple(queries))
            )
        }
        return [answers[query.id] for query in dataset.queries]


@dataclass(frozen=True)
class ScriptOracle:
    """Reads the question with the grammar and looks the answer up in the script."""

    scripts: Mapping[str, Script] = field(repr=False)

    def predict(self, dataset: GroundingDataset) -> list[Prediction]:
        """The true moments of every query, each with the score 1.

        Raises:
            DataError: a question is not of the grammar, or a film has no script.
        """
        return [self._answer(dataset, query) for query in dataset.queries]

    def _answer(self, dataset: GroundingDataset, query: Query) -> Prediction:
        if query.video_id not in self.scripts:
            raise DataError(f"no script of {query.video_id!r} among {len(self.scripts)}")
        script = self.scripts[query.video_id]
        moments = answer(parse(query.text), script)
        return Prediction(
            query.id,
            query.video_id,
            query.text,
            np.column_stack([moments, np.ones(len(moments))]),
            truth=query.moments,
            duration=script.duration,
        )


def best_clip_inside(
    dataset: GroundingDataset, queries: Iterable[Query] | None = None
) -> np.ndarray:
    """(Q,) whether the middle of the clip most like each query lies inside one of its moments.

    Moments shorter than a clip count where the clip covers their middle.
    """
    hits = []
    for query in dataset.queries if queries is None else queries:
        grid = dataset.videos[query.video_id].grid
        best = int(similarity(dataset, query).argmax())
        at, (start, end) = grid.to_seconds(best), query.moments.T
        first, last = grid.clip_span(best)
        middle = (start + end) / 2
        short = (end - start < grid.clip_seconds) & (first <= middle) & (middle <= last)
        hits.append(bool((((start <= at) & (at <= end)) | short).any()))
    return np.array(hits)


def recall_by_level(
    report: MetricReport, dataset: GroundingDataset, metric: str = "R1@0.5"
) -> dict[str, Estimate]:
    """A metric by what is asked for, with 95 % intervals over films.

    Args:
        report: has the metric of every query of `dataset`.
        dataset: of ShapeStories.
        metric: of the report.

    Returns:
        By name, such as "R1@0.5 action", see `by_kind`.
    """
    found = dict(zip(report.query_ids, report.contributions[metric], strict=True))
    return by_kind(dataset, np.array([found[query.id] for query in dataset.queries]), metric)


def by_kind(dataset: GroundingDataset, values: np.ndarray, name: str) -> dict[str, Estimate]:
    """Means of percentages (Q,) by the kind of the queries, with 95 % intervals over films.

    Args:
        dataset: of ShapeStories.
        values: of its queries, in their order.
        name: what the values are.

    Returns:
        By name, such as "inside action", in the order of `questions.LEVELS`, then of the queries
        whose combinations of words were `SEEN` in training and of the others. Kinds without a query
        are left out. Names and numbers fit into a run record.
    """
    members: dict[str, list[int]] = {kind: [] for kind in (*LEVELS, *SEEN)}
    for row, query in enumerate(dataset.queries):
        members[level_of(query)].append(row)
        members[SEEN[unseen(parse(query.text))]].append(row)
    return {
        f"{name} {kind}": bootstrap(
            values[rows], groups=[dataset.queries[row].video_id for row in rows]
        )
        for kind, rows in members.items()
        if rows
    }
