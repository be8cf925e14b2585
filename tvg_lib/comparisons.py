"""Two systems on the same queries: what one has over the other, query by query, with records.

What makes a query hard for both cancels in the difference, so its interval is much narrower than
two intervals side by side suggest. Seeds are averaged query by query first: the interval of the
mean is over recordings, and says how far another draw of the test set would move it.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle
from types import ModuleType
from typing import Protocol

from tvg_lib.errors import DataError
from tvg_lib.metrics import Estimate, MetricReport
from tvg_lib.metrics.report import mean_report
from tvg_lib.results import RunRecord, new_record, records_folder, save


class Tested(Protocol):
    """One test of one system, such as `GroundingTest` or `RetrievalTest`."""

    @property
    def report(self) -> MetricReport: ...

    @property
    def record(self) -> RunRecord: ...


def compare(
    mine: Sequence[Tested],
    base: Sequence[Tested],
    *,
    modules: Sequence[ModuleType | str],
    name: str | None = None,
) -> dict[str, dict[str, Estimate]]:
    """A system minus its base, paired by query: each seed, and the mean of several; with records.

    Args:
        mine, base: tests of the seeds, in the same order. A base of a single test, such as a rule
            without a seed, stands against every seed.
        modules: library modules that made the numbers, for the code hash of the records.
        name: method of the records; by default such as "mscl-minus-snag", with the variant of a
            system behind its method where it is not "main".

    Returns:
        By "seed 0" and so on, and last, of several seeds, such as "mean of 3": the difference of
        every metric that both have. The record of a seed has the variant "main", that of the mean
        such as "mean-of-3".

    Raises:
        DataError: different numbers of seeds, or different test sets.
    """
    if not mine or len(base) not in (1, len(mine)):
        raise DataError(f"expected a base of one seed or {len(mine)}, found {len(base)}")
    datasets = {test.record.dataset for test in (*mine, *base)}
    if len(datasets) > 1:
        raise DataError(f"one test set is needed, found {sorted(datasets)}")
    first = mine[0].record
    seeds = [test.record.seed for test in mine]
    pairs = [
        (f"seed {seed}", "main", [seed], a.report, b.report)
        for seed, a, b in zip(seeds, mine, cycle(base), strict=False)
    ]
    if len(seeds) > 1:
        averaged = [mean_report([test.report for test in tests]) for tests in (mine, base)]
        pairs.append((f"mean of {len(seeds)}", f"mean-of-{len(seeds)}", seeds, *averaged))
    differences = {}
    for label, variant, compared, a, b in pairs:
        differences[label] = a.minus(b)
        record = new_record(
            name or difference_name(first, base[0].record),
            first.dataset,
            first.scale,
            compared[0],
            variant=variant,
            parameters={"seeds": compared, "method": first.parameters},
            metrics=differences[label],
            seconds=sum(t.record.seconds for t in mine if t.record.seed in compared),
            modules=modules,
            data_hash=first.data_hash,
        )
        save(record, records_folder(first.scale, fresh=True))
    return differences


def difference_name(mine: RunRecord, base: RunRecord) -> str:
    """Method of the records of a difference, such as "mscl-without-cross-minus-mscl"."""
    return "-minus-".join(
        r.method if r.variant == "main" else f"{r.method}-{r.variant}" for r in (mine, base)
    )


def over_most_seeds(records: Iterable[RunRecord], name: str, dataset: str) -> str:
    """The variant that rests on the most seeds: a mean, else "main" where a seed was compared.

    Args:
        records: committed or fresh.
        name: method of the records, as from `difference_name`.
        dataset: data set and split.

    Returns:
        "mean-of-3" where there is no record at all: what is still to be run.
    """
    variants = [r.variant for r in records if (r.method, r.dataset) == (name, dataset)]
    means = [int(v.removeprefix("mean-of-")) for v in variants if v.startswith("mean-of-")]
    if means or not variants:
        return f"mean-of-{max(means, default=3)}"
    return "main"
