"""Command line: `python -m tvg_lib.metrics qvhighlights PREDICTIONS.jsonl GROUND_TRUTH.jsonl`."""

import argparse
import json
import math
import sys
import warnings
from typing import Any

from tvg_lib.errors import DataError
from tvg_lib.metrics.qvhighlights import QVHighlightsReport, evaluate_files


def main(arguments: list[str] | None = None) -> int:
    """Prints the metrics as JSON. Exit status 0, or 2 with a message if the input is bad."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = evaluate_files(
                options.predictions,
                options.ground_truth,
                allow_missing=options.allow_missing,
                strict=options.strict,
            )
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        output = _output(report, options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.allow_missing:
        print(f"note: evaluated the {len(report.query_ids)} queries in both files", file=sys.stderr)
    print(json.dumps(_json_ready(output), indent=2, allow_nan=False))
    return 0


def _output(report: QVHighlightsReport, options: argparse.Namespace) -> dict[str, Any]:
    output = dict(report.official if options.full else report.official["brief"])
    if options.bootstrap is not None:
        estimates = report.estimates(
            resamples=options.bootstrap, seed=options.seed, confidence=options.confidence
        )
        output["bootstrap"] = {
            "resamples": options.bootstrap,
            "seed": options.seed,
            "confidence": options.confidence,
            "intervals": {
                name: {"low": round(e.low, 2), "high": round(e.high, 2), "queries": e.n}
                for name, e in estimates.items()
            },
        }
    return output


def _json_ready(value: Any) -> Any:
    """NaN (a range without queries) becomes null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tvg_lib.metrics", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    qvh = commands.add_parser(
        "qvhighlights",
        help="moment retrieval and highlight detection on QVHighlights",
        description="Prints the metrics of the official QVHighlights evaluator as JSON, under its "
        "names and with its two decimals. A range without any query is null.",
    )
    qvh.add_argument(
        "predictions",
        metavar="PREDICTIONS.jsonl",
        help="one object per line: qid, pred_relevant_windows [[start, end, score], ...] and/or "
        "pred_saliency_scores [score per 2-second clip]",
    )
    qvh.add_argument("ground_truth", metavar="GROUND_TRUTH.jsonl", help="official annotations")
    qvh.add_argument(
        "--full",
        action="store_true",
        help="the official nested output: every threshold and range, the usual names in 'brief'",
    )
    qvh.add_argument(
        "--allow-missing",
        action="store_true",
        help="evaluate the queries that both files have, instead of refusing a mismatch",
    )
    qvh.add_argument(
        "--strict",
        action="store_true",
        help="refuse saliency scores that are not one per clip (default: warn, then cut or fill "
        "with zeros as the official evaluator does)",
    )
    qvh.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help="add percentile intervals over queries from N resamples",
    )
    qvh.add_argument("--seed", type=int, default=0, help="seed of the resamples (default 0)")
    qvh.add_argument(
        "--confidence", type=float, default=0.95, help="mass of the intervals (default 0.95)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
