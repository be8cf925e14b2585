"""F2SGD: frame-frame similarity guided detection (Tan et al., CVPR 2025, section 3.3).

    symbol     here                                   equation
    S^a        similarity_map                         13
    CNNs       F2SGD.convolutions, kernel C           13
    MLP        F2SGD.mlp                              13
    P          CellScores.logits (before a sigmoid)   13
    top-k      CellScores.ranked                      15

A cell (i, j) stands for the moment of frames i to j, both included. Frames of a moment are alike
once they are aligned with the query, so a moment is a bright block on the diagonal of S^a, and its
upper right corner is the cell (start, end).

The losses (equation 14) are in `tvg_lib.losses.cells`. What the paper leaves open is in
`F2SGDConfig`, with the printed form kept: channels, activations, and whether the detector sees
anything but S^a. With `evidence` it also reads the relevance of the frames: a cell starts with the
sum of its frames' logits, which is what the best interval would be if S^a said nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.errors import ConfigurationError
from tvg_lib.models.alignment import Alignment
from tvg_lib.nn.square import SquareConvolution


def similarity_map(
    features: Tensor, mask: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """S^a (Q, N, M): cosines between aligned frames, zero where a frame is invalid.

    Args:
        features: (Q, T, D) V^a.
        mask: (Q, T).
        rows, columns: (N,) and (M,) frames of a part of the map; all by default.
    """
    whole = slice(None)
    start, end = (
        _unit(features[:, part], mask[:, part])
        for part in (whole if rows is None else rows, whole if columns is None else columns)
    )
    return start @ end.transpose(1, 2)


def _unit(features: Tensor, mask: Tensor) -> Tensor:
    """(Q, T, D) frames of length 1, zero where invalid."""
    return F.normalize(features, dim=-1, eps=1e-8) * mask[..., None]


def map_contrast(unit: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (Q, 1, 1) of all cells of S^a, in time linear in T.

    The cells sum to the squared length of the sum of all frames; their squares sum to the squared
    norm of the frames' second-moment matrix. So a banded map is scaled as the whole one is.

    Args:
        unit: (Q, T, D) frames of length 1, zero where invalid.
        mask: (Q, T).
    """
    cells = mask.sum(1).to(unit.dtype) ** 2
    steps, channels = unit.shape[1:]
    other = unit.transpose(1, 2)
    moments = unit @ other if steps <= channels else other @ unit
    mean = unit.sum(1).square().sum(-1) / cells
    variance = moments.square().sum((1, 2)) / cells - mean**2
    return mean[:, None, None], (variance.clamp(min=0) + 1e-4).sqrt()[:, None, None]


@dataclass(frozen=True)
class CellScores:
    """One score per candidate moment: P of equation 13, before any sigmoid.

    Attributes:
        logits: (Q, T, W). Cell (i, j) is the moment of frames i to j, or, where `banded`, of frames
            i to i + j.
        mask: (Q, T, W) True where the moment exists: i <= j, both frames real.
        relevance: (Q, T) of the alignment.
        banded: how columns are counted.
    """

    logits: Tensor
    mask: Tensor
    relevance: Tensor
    banded: bool = False

    def ranked(self, keep: int) -> tuple[Tensor, Tensor]:
        """The `keep` best moments, equation 15.

        Returns:
            moments (Q, K, 2) in grid-index units, from the first frame's start to the last one's
            end, and scores (Q, K) in (0, 1), best first; -inf where there are no more.
        """
        columns = self.logits.shape[-1]
        flat = self.logits.float().masked_fill(~self.mask, -torch.inf).flatten(1)
        top, index = flat.topk(min(keep, flat.shape[1]), dim=1)
        # Shares of a softmax over all moments: high logits stay apart, as in a sigmoid they do not.
        scores = (top - flat.logsumexp(1, keepdim=True)).exp()
        scores = scores.masked_fill(top == -torch.inf, -torch.inf)
        first, last = index // columns, index % columns
        if self.banded:
            last = first + last
        return torch.stack([first - 0.5, last + 0.5], dim=-1), scores


@dataclass(frozen=True)
class F2SGDConfig:
    """Size of the detector and what it reads.

    Attributes:
        kernel: C of both convolutions, odd.
        channels: of the convolutions.
        hidden: width of the MLP.
        evidence: read the frames' relevance beside S^a (see the module's docstring).
        standardised: read S^a with mean 0 and variance 1 over the map, not as printed: features of
            captions are all alike, and what tells them apart would be small.
        zero_start: the MLP's last layer starts at zero, not at Xavier's random weights as printed.
            To equation 14 a random map of thousands of cells is all error; training first unlearns
            it, and the ReLUs may not survive that (notebook 42 has the numbers).
        band: longer videos are scored for moments of at most this many frames, in memory linear in
            their length; None scores all moments of any video at once.
    """

    kernel: int = 21
    channels: int = 16
    hidden: int = 32
    evidence: bool = True
    standardised: bool = True
    zero_start: bool = True
    band: int | None = 256

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigurationError(f"F2SGDConfig.kernel is odd, found {self.kernel}")
        if self.band is not None and self.band < 1:
            raise ConfigurationError(f"F2SGDConfig.band is positive, found {self.band}")


class F2SGD(nn.Module):
    """Two convolutions with a large kernel and an MLP on the similarity map; a detector."""

    def __init__(self, config: F2SGDConfig) -> None:
        super().__init__()
        self.config = config
        planes = 3 if config.evidence else 1
        self.convolutions = nn.ModuleList(
            [
                SquareConvolution(planes, config.channels, config.kernel),
                SquareConvolution(config.channels, config.channels, config.kernel),
            ]
        )
        self.mlp = nn.Sequential(
            nn.Linear(config.channels + (planes if config.evidence else 0), config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, 1),
        )
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if config.zero_start:
            nn.init.zeros_(self.mlp[2].weight)
        if config.evidence:
            self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, alignment: Alignment) -> CellScores:
        """Scores of all moments; of those in the band, where the video is longer than the band."""
        band, steps = self.config.band, alignment.mask.shape[1]
        if band is not None and steps > band:
            return self.banded(alignment, band)
        return self.dense(alignment)

    def dense(self, alignment: Alignment) -> CellScores:
        """Scores of all T x T cells."""
        steps = alignment.mask.shape[1]
        index = torch.arange(steps, device=alignment.mask.device)
        logits, square = self._window(alignment, self._contrast(alignment), index, index)
        mask = square & (index[:, None] <= index)
        return CellScores(logits, mask, alignment.relevance)

    def banded(self, alignment: Alignment, band: int, tile: int = 128) -> CellScores:
        """Scores of all moments of at most `band` frames, equal to those of `dense`.

        The map is cut into tiles along the diagonal, each with the margin that two kernels reach
        over; cells beyond the video are zero there as they are at the edge of the whole map.

        Args:
            alignment: of videos of any length.
            band: longest moment, in frames.
            tile: first frames per tile.
        """
        mask, steps = alignment.mask, alignment.mask.shape[1]
        device = mask.device
        margin = self.config.kernel // 2 * 2
        offsets = torch.arange(band, device=device)
        contrast = self._contrast(alignment)
        pieces = []
        for start in range(0, steps, tile):
            count = min(tile, steps - start)
            low = max(0, start - margin)
            rows = torch.arange(low, min(steps, start + count + margin), device=device)
            columns = torch.arange(low, min(steps, start + count + band + margin), device=device)
            logits, _ = self._window(alignment, contrast, rows, columns)
            first = torch.arange(start, start + count, device=device)
            last = (first[:, None] + offsets).clamp(max=int(columns[-1])) - low
            pieces.append(logits[:, (first - low)[:, None], last])
        logits = torch.cat(pieces, dim=1)  # (Q, T, band)
        last = torch.arange(steps, device=device)[:, None] + offsets
        exists = mask[:, last.clamp(max=steps - 1)] & (last < steps) & mask[..., None]
        return CellScores(logits, exists, alignment.relevance, banded=True)

    def _contrast(self, alignment: Alignment) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of the whole of S^a, where the detector scales it by them."""
        if not self.config.standardised:
            return None
        return map_contrast(_unit(alignment.features, alignment.mask), alignment.mask)

    def _window(
        self,
        alignment: Alignment,
        contrast: tuple[Tensor, Tensor] | None,
        rows: Tensor,
        columns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits and validity (Q, N, M) of the cells of some consecutive rows and columns."""
        similar = similarity_map(alignment.features, alignment.mask, rows, columns)
        valid = alignment.mask[:, rows, None] & alignment.mask[:, None, columns]
        if contrast is not None:
            mean, deviation = contrast
            similar = (similar - mean) / deviation
        planes = [similar]
        if self.config.evidence:
            total = self._evidence(alignment, rows, columns)
            length = (columns - rows[:, None]).abs() + 1.0
            # Sums grow with the length: their mean, and the length itself, on scales near 1.
            planes += [total / length, (length.log() - 2.0).expand_as(similar)]
        x = torch.stack(planes, dim=1)  # (Q, P, N, M)
        square = valid[:, None]
        h = x
        for convolution in self.convolutions:
            h = F.relu(convolution(h, square))
        if self.config.evidence:
            h = torch.cat([h, x], dim=1)
        logits = self._per_cell(h)
        if self.config.evidence:
            logits = logits + self.gain * total
        return logits, valid

    def _per_cell(self, h: Tensor) -> Tensor:
        """The MLP at every cell, (Q, C, N, M) to (Q, N, M), without moving the channels last."""
        first, activation, second = self.mlp
        hidden = activation(first.weight @ h.flatten(2) + first.bias[:, None])
        return (second.weight @ hidden + second.bias[:, None]).view(h.shape[0], *h.shape[2:])

    @staticmethod
    def _evidence(alignment: Alignment, rows: Tensor, columns: Tensor) -> Tensor:
        """(Q, N, M) sum of the frames' relevance from the smaller to the larger of i and j."""
        sums = F.pad(alignment.relevance, (1, 0)).cumsum(1)
        first = torch.minimum(rows[:, None], columns)
        last = torch.maximum(rows[:, None], columns)
        return sums[:, last + 1] - sums[:, first]
