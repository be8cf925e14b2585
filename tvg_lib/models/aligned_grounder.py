"""An aligner and a detector make a grounder: the frame of A2FA + F2SGD and of what it is compared
with. Every pairing works: both ends speak `Alignment`.

    video, sentence, words ──aligner──▶ aligned frames, relevance ──detector──▶ ranked moments
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch, evaluation_batches
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.decoding import DecodingConfig, Prediction, decode, to_predictions
from tvg_lib.models.alignment import Aligner, Alignment, AlignmentInput


class RankedMoments(Protocol):
    """What a detector returns: something that ranks moments and scores frames."""

    @property
    def relevance(self) -> Tensor:
        """(Q, T) scores of the frames, also as highlights."""

    def ranked(self, keep: int) -> tuple[Tensor, Tensor]:
        """Moments (Q, K, 2) in grid-index units and scores (Q, K), best first; -inf for none."""


class AlignedGrounder(nn.Module):
    """Align, then detect.

    Args:
        aligner: an `Aligner`.
        detector: an `Alignment` to `RankedMoments`.
    """

    def __init__(self, aligner: nn.Module, detector: nn.Module) -> None:
        super().__init__()
        self.aligner: Aligner = aligner
        self.detector = detector

    def align(self, batch: GroundingBatch) -> Alignment:
        """The aligned frames of every query of a batch."""
        return self.aligner(AlignmentInput.of(batch))

    def forward(self, batch: GroundingBatch) -> RankedMoments:
        return self.detector(self.align(batch))


@torch.inference_mode()
def ground_aligned(
    model: nn.Module,
    dataset: GroundingDataset,
    config: DecodingConfig,
    videos_per_batch: int = 16,
    queries_per_batch: int = 32,
) -> list[Prediction]:
    """Ask every query of a data set of its video; predictions in the order of `dataset.queries`.

    Args:
        model: its output ranks moments (`RankedMoments`); left in the mode it came in.
        dataset: what is asked.
        config: `pre_top_k` candidates are taken, suppressed (or not: `suppression=None` is the
            paper's top-k) and cut to `keep`. Thresholds are on the detector's own scores.
        videos_per_batch, queries_per_batch: bounds on memory.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    predictions: dict[str, Prediction] = {}
    try:
        for batch in evaluation_batches(dataset, videos_per_batch, queries_per_batch):
            batch = batch.to(device)
            output = model(batch)
            moments, scores = decode(*output.ranked(config.pre_top_k), config)
            answers = to_predictions(moments, scores, batch, dataset, saliency=output.relevance)
            predictions |= {answer.query_id: answer for answer in answers}
    finally:
        model.train(training)
    return [predictions[query.id] for query in dataset.queries]


TOP_K = DecodingConfig(pre_top_k=10, suppression=None, keep=10)
"""Equation 15 of A2FA + F2SGD on QVHighlights: the ten best moments, overlapping or not."""
