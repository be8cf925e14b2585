"""Metrics of moment retrieval, highlight detection and video retrieval, with intervals.

Every metric comes as a `MetricReport`: values in percent, the per-query numbers behind them, and
from those bootstrap intervals (`estimates`) and paired differences of two systems (`minus`).
"""

from tvg_lib.metrics.bootstrap import Estimate, bootstrap, bootstrap_many, paired_bootstrap
from tvg_lib.metrics.qvhighlights import QVHighlightsReport, evaluate, evaluate_files
from tvg_lib.metrics.recall import RecallReport, recall_at_k
from tvg_lib.metrics.report import MetricReport
from tvg_lib.metrics.retrieval import (
    RetrievalReport,
    ranks_from_lists,
    ranks_from_scores,
    retrieval_report,
)

__all__ = [
    "Estimate",
    "MetricReport",
    "QVHighlightsReport",
    "RecallReport",
    "RetrievalReport",
    "bootstrap",
    "bootstrap_many",
    "evaluate",
    "evaluate_files",
    "paired_bootstrap",
    "ranks_from_lists",
    "ranks_from_scores",
    "recall_at_k",
    "retrieval_report",
]
