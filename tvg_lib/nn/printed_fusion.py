"""Equations 5 to 7 of the MSCL paper taken at their word, in two readings that have a shape.

    Z' = LN(Z), E' = LN(E)                     (5)
    O = softmax(Z'^T E' / sqrt(D)) . Z'        (6)
    X = beta * MLP(LN(O)) + O                  (7)

With one row per step, the scores Z' E'^T are (T, K): steps by words. Times Z' (T, D) they have no
shape, so equation 6 means one of two things:

- values "words": ordinary cross-attention. The softmax runs over the words and weighs E', not Z'.
  What is left of a step are its weights: O lies in the span of the words. (The author's repository
  reads it so, and says that it is a reading.)
- values "video": the last factor is Z', as printed. Then the softmax can only run over the *steps*
  (over the words its weights sum to 1, and the query would drop out), those of one level, and the
  words are averaged: O_t = T mean_k softmax_t(Z'_t . E'_k / sqrt(D)) Z'_t, where T, the steps of
  the level, makes even attention leave Z' as it is. A step is scaled by how much the words attend
  to it.

Neither has projections, heads or a path round the attention. SnAG's released code, which MSCL says
it builds on, has all of them: `tvg_lib.nn.fusion.LateFusion`, the default everywhere. To use one of
these instead, replace the part of a model: `model.fusion = PrintedFusion(...)`.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from tvg_lib.nn.feed_forward import FeedForward
from tvg_lib.nn.sequence import LayerScale, zero_invalid

Values = Literal["words", "video"]


class PrintedFusionBlock(nn.Module):
    """Equations 5 to 7 once.

    Args:
        channels: width D of video and words.
        values: which reading of equation 6.
        scale: start of beta.
    """

    def __init__(
        self,
        channels: int,
        values: Values = "words",
        expansion: int = 4,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.values = values
        self.video_norm = nn.LayerNorm(channels)
        self.text_norm = nn.LayerNorm(channels)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, expansion, dropout)
        self.feed_forward_scale = LayerScale(channels, drop_path, scale)

    def forward(self, x: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Args: x (Q, P, D), mask (Q, P), text (Q, K, D), text_mask (Q, K). Returns (Q, P, D).

        Levels lie end to end in P, with a step between them that no row has.
        """
        x, words = self.video_norm(zero_invalid(x, mask)), self.text_norm(text)
        scores = x @ words.transpose(1, 2) / math.sqrt(x.shape[-1])  # (Q, P, K)
        if self.values == "words":
            x = scores.masked_fill(~text_mask[:, None], -torch.inf).softmax(-1) @ words
        else:
            shares = torch.cat(
                [
                    self._shares(*part, text_mask)
                    for part in zip(
                        *(v.tensor_split(_level_starts(mask), dim=1) for v in (scores, mask)),
                        strict=True,
                    )
                ],
                dim=1,
            )
            x = x * shares.to(x.dtype)[..., None]
        x = x + self.feed_forward_scale(self.feed_forward(self.feed_forward_norm(x)))
        return zero_invalid(x, mask)

    @staticmethod
    def _shares(scores: Tensor, mask: Tensor, text_mask: Tensor) -> Tensor:
        """(Q, T) attention of the words to each step of a level, 1 where all are attended alike."""
        # A finite fill: the weights of a query whose video is all padding stay finite.
        attention = scores.float().masked_fill(~mask[..., None], -1e9).softmax(1)
        even = text_mask.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return attention.masked_fill(~text_mask[:, None], 0.0).sum(-1) / even


def _level_starts(mask: Tensor) -> tuple[int, ...]:
    """First steps of all levels but the first, where (Q, P) levels lie end to end."""
    there = mask.any(0)
    starts = (there[1:] & ~there[:-1]).nonzero()[:, 0] + 1
    return tuple(int(start) for start in starts[0 if bool(there[:1].any()) else 1 :])


class PrintedFusion(nn.Module):
    """Stands where `LateFusion` stands: blocks of equations 5 to 7 and a closing layer norm.

    Args:
        channels, text_channels: widths of video and words; words of another width are projected.
        layers: the paper has one. With "words", a second would see the words' features only.
        values, dropout, drop_path: of the blocks.
    """

    def __init__(
        self,
        channels: int,
        text_channels: int,
        layers: int = 1,
        values: Values = "words",
        dropout: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.text_projection = (
            nn.Identity() if text_channels == channels else nn.Linear(text_channels, channels)
        )
        self.layers = nn.ModuleList(
            PrintedFusionBlock(channels, values, dropout=dropout, drop_path=drop_path)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, x: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Args: x (B, P, D), mask (B, P), text (Q, K, C), text_mask (Q, K), row (Q,).

        Returns:
            (Q, P, D) and the mask (Q, P).
        """
        x, mask, text = x[row], mask[row], self.text_projection(text)
        for layer in self.layers:
            x = layer(x, mask, text, text_mask)
        return self.norm(x), mask
