"""Other ways to choose what is contrasted: the alternatives of MSCL's Tables 4 and 6.

The paper names them in a sentence each. What it leaves open is decided here, and said. In several
processes, samples from other videos are those of a process's own share of the batch.

Table 4, where the samples come from; anchors, losses and numbers of samples are MSCL's own:

    TokenMixContrast     from an augmented view of the video (Tube TokenMix, Xing et al. 2023)
    MemoryBankContrast   from a bank of running means of earlier steps (Panta et al. 2024 have a
                         momentum memory)

Table 6, what is associated:

    QueryQueryContrast       queries with queries
    MomentQueryContrast      moments with their query
    SimilarSentenceContrast  moments with moments of queries whose sentences are alike (the paper's
                             similarity is that of CLIP's text tower; here it is that of the
                             sentence encoder the data set was embedded with)
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.losses.contrastive import random_subset
from tvg_lib.losses.multiscale import (
    ContrastConfig,
    Draw,
    MultiScaleContrast,
    Pool,
    contrast,
    gather_steps,
    sampled_pools,
)
from tvg_lib.models.token_mix import TwoViewPredictions
from tvg_lib.nn.pyramid import PointPredictions


class TokenMixContrast(MultiScaleContrast):
    """Positives and negatives at the same steps of the mixed view (Table 4, data augmentation).

    A target's own copy in the other view is a positive, too: it is not the same vector.
    """

    def pools(self, output: PointPredictions, batch: GroundingBatch, draw: Draw) -> list[Pool]:
        """Targets and negatives of the mixed view, level by level."""
        if not isinstance(output, TwoViewPredictions):
            raise ConfigurationError(
                "TokenMixContrast needs the second view of a TokenMixGrounder in training mode"
            )
        return sampled_pools(output.view.levels, draw, anchors_among_them=False)


class MemoryBankContrast(MultiScaleContrast):
    """Positives and negatives from a bank of running means (Table 4, memory bank).

    A slot of the bank holds, level by level, the running mean of one query's target features over
    the steps that saw it. The positive is the query's own slot, the negatives are slots of other
    videos, at most as many as its targets on the level. Slots are given by a hash of the query's
    id; a newcomer takes the slot over. In the first epoch only negatives exist: the loss is 0.

    In several processes the bank is that of the first one, whose buffers the others receive, and
    so knows its share of the queries only.

    Args:
        config: as in `MultiScaleContrast`.
        channels, levels: of the pyramid.
        size: slots; several times the number of training queries keeps collisions few.
        momentum: share of the old mean that stays.
        update_every: steps between two updates of the bank.
    """

    def __init__(
        self,
        config: ContrastConfig | None,
        channels: int,
        levels: int,
        size: int = 16384,
        momentum: float = 0.9,
        update_every: int = 1,
    ) -> None:
        super().__init__(config)
        if size < 1 or update_every < 1 or not 0 <= momentum < 1:
            raise ConfigurationError(
                "MemoryBankContrast needs size >= 1, update_every >= 1 and 0 <= momentum < 1, "
                f"found {size}, {update_every}, {momentum}"
            )
        self.size, self.momentum, self.update_every = size, momentum, update_every
        self.register_buffer("bank", torch.zeros(size, levels, channels))
        self.register_buffer("present", torch.zeros(size, levels, dtype=torch.bool))
        self.register_buffer("owner", torch.full((size,), -1))
        self.register_buffer("video", torch.full((size,), -1))
        self.register_buffer("step", torch.tensor(0))

    def pools(self, output: PointPredictions, batch: GroundingBatch, draw: Draw) -> list[Pool]:
        """The own slot and random foreign slots, level by level; then the bank is updated."""
        device = output.logits.device
        owner = _hashes(batch.query_ids, device)[draw.query]
        video = _hashes(batch.video_ids, device)[batch.query_video[draw.query]]
        slot = owner % self.size
        known = self.owner[slot] == owner
        filled = self.present.any(1).nonzero().squeeze(1)
        pools = []
        for level, targets in enumerate(draw.targets):
            wanted = targets.sum(1)
            count = max(1, int(wanted.max()))
            drawn = torch.zeros(len(slot), count, dtype=torch.long, device=device)
            if len(filled):
                drawn = filled[torch.randint(len(filled), drawn.shape, device=device)]
            foreign = self.present[drawn, level] & (self.video[drawn] != video[:, None])
            foreign &= torch.arange(count, device=device) < wanted[:, None]
            own = self.present[slot, level] & known
            features = torch.cat([self.bank[slot, level][:, None], self.bank[drawn, level]], dim=1)
            pools.append(Pool(features, F.pad(own[:, None], (0, count)), F.pad(foreign, (1, 0))))
        if self.training:
            if self.step % self.update_every == 0:
                self._update(output, draw, slot, owner, video)
            self.step += 1
        return pools

    @torch.no_grad()
    def _update(
        self, output: PointPredictions, draw: Draw, slot: Tensor, owner: Tensor, video: Tensor
    ) -> None:
        fresh = (self.owner[slot] != owner)[:, None]
        means, seen = [], []
        for x, targets in zip(output.pyramid.levels, draw.targets, strict=True):
            features, mask, _ = gather_steps(x, draw.row, targets)
            features = features.to(self.bank) * mask[..., None]
            means.append(features.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
            seen.append(mask.any(1))
        mean, here = torch.stack(means, 1), torch.stack(seen, 1)  # (N, L, D), (N, L)
        before = self.present[slot] & ~fresh
        old = self.bank[slot]
        blended = torch.where(
            before[..., None], self.momentum * old + (1 - self.momentum) * mean, mean
        )
        self.bank[slot] = torch.where(here[..., None], blended, old)
        self.present[slot] = before | here
        self.owner[slot], self.video[slot] = owner, video


class SimilarSentenceContrast(MultiScaleContrast):
    """Moments of the batch with moments of similar sentences (Table 6, CLIP-based).

    Args:
        config: as in `MultiScaleContrast`.
        alike, distant: cosine similarity of sentences from which, and up to which, their moments
            are positives or negatives of each other (paper: 0.8 and 0.2).
    """

    def __init__(
        self, config: ContrastConfig | None = None, alike: float = 0.8, distant: float = 0.2
    ) -> None:
        super().__init__(config)
        self.alike, self.distant = alike, distant

    def pools(self, output: PointPredictions, batch: GroundingBatch, draw: Draw) -> list[Pool]:
        """Targets of all drawn queries, level by level."""
        similar = sentence_similarity(batch)[draw.query][:, draw.query]  # (N, N)
        pools = []
        for x, targets in zip(output.pyramid.levels, draw.targets, strict=True):
            features, mask, step = gather_steps(x, draw.row, targets)
            count = mask.shape[1]
            pair = similar.repeat_interleave(count, dim=1)  # (N, N * K)
            candidates = (pair <= self.distant) & mask.flatten()
            place = (draw.row[:, None] * x.shape[1] + step).masked_fill(~mask, -1)  # (N, K)
            pools.append(
                Pool(
                    features.flatten(0, 1),
                    (pair >= self.alike) & mask.flatten(),
                    random_subset(candidates, mask.sum(1, keepdim=True)),
                    place[..., None] == place.flatten(),
                )
            )
        return pools


class MomentQueryContrast(nn.Module):
    """Queries with the points of their moments (Table 6, moment-query).

    The anchor is the mean of a query's encoded words, its positives are its targets on every level,
    its negatives as many targets of queries about *other* videos, as in the works the paper
    compares itself with. Words of another width are projected.

    Args:
        config: as in `MultiScaleContrast`.
        text_channels, channels: widths of encoded words and of the pyramid.
    """

    def __init__(self, config: ContrastConfig | None, text_channels: int, channels: int) -> None:
        super().__init__()
        self.moments = MultiScaleContrast(config)
        self.projection = (
            nn.Identity() if text_channels == channels else nn.Linear(text_channels, channels)
        )

    def forward(self, output: PointPredictions, batch: GroundingBatch) -> dict[str, Tensor]:
        """The term "association"."""
        with torch.autocast(output.logits.device.type, enabled=False):
            draw = self.moments.draw(output, batch)
            query = self.projection(mean_word(output)[draw.query])[:, None]  # (N, 1, D)
            other = batch.query_video[draw.query]
            other = other[:, None] != other
            parts = []
            for x, targets in zip(output.pyramid.levels, draw.targets, strict=True):
                features, mask, _ = gather_steps(x, draw.row, targets)
                own = torch.eye(len(mask), dtype=torch.bool, device=x.device)
                own, foreign = (
                    choice.repeat_interleave(mask.shape[1], dim=1) & mask.flatten()
                    for choice in (own, other)
                )
                negative = random_subset(foreign, mask.sum(1, keepdim=True))
                logits = self.moments.similarity(query, features.flatten(0, 1))
                parts.append(contrast(logits, own[:, None], negative[:, None]))
            return {"association": self.moments.reduce(parts)}


class QueryQueryContrast(nn.Module):
    """Queries with queries of similar sentences (Table 6, query-query).

    Positives and negatives are chosen as in `SimilarSentenceContrast`, but the encoded queries
    (means of their words) are compared, and no moment takes part.

    Args:
        config: as in `MultiScaleContrast`; of it only similarity, temperature and reduction matter.
        alike, distant: as in `SimilarSentenceContrast`.
    """

    def __init__(
        self, config: ContrastConfig | None = None, alike: float = 0.8, distant: float = 0.2
    ) -> None:
        super().__init__()
        self.queries = MultiScaleContrast(config)
        self.alike, self.distant = alike, distant

    def forward(self, output: PointPredictions, batch: GroundingBatch) -> dict[str, Tensor]:
        """The term "association"."""
        with torch.autocast(output.logits.device.type, enabled=False):
            similar = sentence_similarity(batch)
            itself = torch.eye(len(similar), dtype=torch.bool, device=similar.device)
            positive = (similar >= self.alike) & ~itself
            number = positive.sum(1, keepdim=True)
            negative = random_subset(similar <= self.distant, number)
            query = mean_word(output)[:, None]  # (Q, 1, C)
            logits = self.queries.similarity(query, query[:, 0])
            part = contrast(logits, positive[:, None], negative[:, None])
            return {"association": self.queries.reduce([part])}


def mean_word(output: PointPredictions) -> Tensor:
    """(Q, C) mean of the encoded words of each query, in float32 at least."""
    text = output.text if output.text.dtype == torch.float64 else output.text.float()
    kept = output.text_mask[..., None]
    return (text * kept).sum(1) / kept.sum(1).clamp(min=1)


def sentence_similarity(batch: GroundingBatch) -> Tensor:
    """(Q, Q) cosine similarity of the sentences.

    Raises:
        DataError: the data set has no sentence features.
    """
    if batch.sentence is None:
        raise DataError("the association by sentence needs a data set with sentence features")
    unit = F.normalize(batch.sentence, dim=-1)
    return unit @ unit.T


def _hashes(names: Sequence[str], device: torch.device) -> Tensor:
    """(N,) non-negative 63-bit integers, the same on every machine."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor([int.from_bytes(d, "big") >> 1 for d in digests], device=device)
