"""Soft-NMS and voting: all queries at once against the straightforward loop.

    python benchmarks/decoding.py --out benchmarks/results/decoding.json

Three ways to the same K moments, timed in turns so that a busy machine slows all alike:
`vectorised` is `tvg_lib.decoding.decode`; `loop` is the plain Python loop stopped after K picks;
`loop_all` lets the loop run out of candidates and cuts its list afterwards, which is O(N^2). Before
timing, the moments of all three are compared.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from plain_suppression import slow_suppress, slow_vote

from tvg_lib import paths
from tvg_lib.decoding import DecodingConfig, decode
from tvg_lib.results import environment


def candidates(queries: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Candidates crowded as those of a pyramid are: (Q, N, 2) in clips and (Q, N), best first."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(queries, count, generator=generator, dtype=torch.float64) * 2304
    exponent = torch.rand(queries, count, generator=generator, dtype=torch.float64) * 8
    scores = torch.rand(queries, count, generator=generator, dtype=torch.float64)
    half = 2**exponent
    moments = torch.stack([center - half, center + half], dim=-1)
    return moments, scores.sort(dim=1, descending=True).values


def ways(
    moments: Tensor, scores: Tensor, config: DecodingConfig
) -> dict[str, Callable[[], Tensor]]:
    """Each gives the (Q, K, 2) moments that remain."""

    def loop(keep: int) -> Tensor:
        result = []
        for spans, values in zip(moments.tolist(), scores.tolist(), strict=True):
            picked, _ = slow_suppress(
                spans,
                values,
                keep,
                config.suppression,
                config.sigma,
                config.iou_threshold,
                config.min_score,
            )
            result.append(slow_vote(picked[: config.keep], spans, values, config.voting_threshold))
        return torch.tensor(result, dtype=moments.dtype)

    return {
        "vectorised": lambda: decode(moments, scores, config)[0],
        "loop": lambda: loop(config.keep),
        "loop_all": lambda: loop(moments.shape[1]),
    }


def measure(queries: int, count: int, rounds: int, longest: float) -> dict[str, object]:
    """Seconds of every way; one that takes more than `longest` seconds is run once."""
    config = DecodingConfig()
    contenders = ways(*candidates(queries, count), config)
    expected = contenders["vectorised"]()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    error = 0.0
    for number in range(rounds):
        for name, way in contenders.items():
            if number and seconds[name][0] > longest:
                continue
            start = time.perf_counter()
            found = way()
            seconds[name].append(time.perf_counter() - start)
            error = max(error, (found - expected).abs().max().item())
    if error > 1e-6:
        raise AssertionError(f"the ways disagree by {error} at Q={queries}, N={count}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "queries": queries,
        "candidates": count,
        "keep": config.keep,
        "seconds": medians,
        "runs": {name: len(values) for name, values in seconds.items()},
        "speedup": {
            name: medians[name] / medians["vectorised"] for name in medians if name != "vectorised"
        },
        "max_abs_error": error,
    }


def main() -> None:
    """Measure every size and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--candidates", type=int, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds a way may repeat at")
    arguments = parser.parse_args()
    rows = []
    for queries in arguments.queries:
        for count in arguments.candidates:
            rows.append(measure(queries, count, arguments.rounds, arguments.longest))
            times = " ".join(f"{k} {v:.2e} s" for k, v in rows[-1]["seconds"].items())
            print(f"Q={queries} N={count}: {times}", flush=True)
    record = {"environment": environment(), "load": os.getloadavg(), "rows": rows}
    paths.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
