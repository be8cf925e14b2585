"""What every metric of this package returns: values, and the per-query numbers behind them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

import numpy as np

from tvg_lib.errors import DataError
from tvg_lib.metrics.bootstrap import Estimate, bootstrap_many, paired_bootstrap


@dataclass(frozen=True, eq=False, repr=False)
class MetricReport:
    """Metrics of one system on one set of queries.

    Attributes:
        query_ids: the Q queries, in the order of the per-query numbers.
        values: metric name -> percentage over all queries, not rounded; NaN if no query counts.
        contributions: metric name -> (Q,) percentage of each query, NaN where the query does not
            count; its mean over the queries that count is the value.
        groups: (Q,) what each query belongs to, such as the recording it is about; intervals draw
            groups whole. None takes the queries for independent.
    """

    query_ids: tuple[Hashable, ...]
    values: dict[str, float]
    contributions: dict[str, np.ndarray]
    groups: tuple[Hashable, ...] | None = field(default=None, kw_only=True)

    def brief(self, digits: int = 2) -> dict[str, float]:
        """The values, rounded as they are printed."""
        return {name: float(f"{value:.{digits}f}") for name, value in self.values.items()}

    def estimates(
        self, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
    ) -> dict[str, Estimate]:
        """Every metric with its bootstrap interval; see `bootstrap`."""
        estimates = bootstrap_many(
            self.contributions,
            groups=self.groups,
            resamples=resamples,
            seed=seed,
            confidence=confidence,
        )
        return {name: replace(e, value=self.values[name]) for name, e in estimates.items()}

    def minus(
        self,
        other: "MetricReport",
        *,
        resamples: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> dict[str, Estimate]:
        """How much better this system is than `other`: the paired bootstrap, metric by metric.

        Queries are matched by id; metrics that only one of the two reports has are left out.

        Raises:
            DataError: the two reports are not about the same queries.
        """
        row = {query: i for i, query in enumerate(other.query_ids)}
        different = set(self.query_ids) ^ set(other.query_ids)
        if different or len(row) != len(other.query_ids):
            shown = sorted(map(repr, different))[:5]
            raise DataError(
                f"paired reports need the same queries, found {len(self.query_ids)} and "
                f"{len(other.query_ids)}, of which {len(different)} in one only: {shown}"
            )
        order = np.array([row[query] for query in self.query_ids])
        return {
            name: paired_bootstrap(
                mine,
                other.contributions[name][order],
                groups=self.groups,
                resamples=resamples,
                seed=seed,
                confidence=confidence,
            )
            for name, mine in self.contributions.items()
            if name in other.contributions
        }

    def __repr__(self) -> str:
        width = max(map(len, self.values), default=0)
        rows = [f"  {name:<{width}}  {value:6.2f}" for name, value in self.values.items()]
        return "\n".join([f"{type(self).__name__}, {len(self.query_ids)} queries", *rows])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.values)
        body = "".join(f"<td>{value:.2f}</td>" for value in self.values.values())
        return (
            f"<table><caption>{len(self.query_ids)} queries</caption>"
            f"<tr>{head}</tr><tr>{body}</tr></table>"
        )


def mean_report(reports: Sequence[MetricReport]) -> MetricReport:
    """Several runs on the same queries, such as seeds, as one: every number is their mean.

    Raises:
        DataError: there is no report, or they differ in queries or metrics.
    """
    if not reports:
        raise DataError("a mean needs one report or more")
    first = reports[0]
    for other in reports[1:]:
        if other.query_ids != first.query_ids or set(other.values) != set(first.values):
            raise DataError("reports with different queries or metrics have no mean")
    return MetricReport(
        first.query_ids,
        {name: float(np.mean([r.values[name] for r in reports])) for name in first.values},
        {
            name: np.mean([r.contributions[name] for r in reports], axis=0)
            for name in first.contributions
        },
        groups=first.groups,
    )


def percent(hits: np.ndarray) -> np.ndarray:
    """(..., Q) hits or fractions -> percentages as floats."""
    return 100.0 * np.asarray(hits, dtype=np.float64)
