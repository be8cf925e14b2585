"""Anchors between tokens: small groups pooled, and the mixed sequence [a0, t0, t1, a1, ...].

A group is `stride` neighbouring tokens; its anchor stands in front of it. All shapes keep the
groups apart, (B, N, stride, C), so that interleaving is one concatenation and the way back a view.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.attention import MultiHeadAttention

Pooling = Literal["mean", "max", "attention", "gated"]


class AnchorPooling(nn.Module):
    """One anchor per group of tokens.

    "mean" and "max" pool the channels; "gated" mixes the two by a sigmoid gate that reads both;
    "attention" asks the tokens of a group by one learnt query. Only valid tokens count. A group
    without any gives a zero anchor.

    Args:
        channels: C.
        method: see above.
        dropout: on attention weights ("attention" only).
        leak_padding: count invalid tokens as zeros instead, as the released code does: the last
            anchor of an odd sequence is then half of its token.
    """

    def __init__(
        self,
        channels: int,
        method: Pooling = "mean",
        dropout: float = 0.0,
        leak_padding: bool = False,
    ) -> None:
        super().__init__()
        if method not in ("mean", "max", "attention", "gated"):
            raise ValueError(
                f"unknown pooling {method!r}; expected 'mean', 'max', 'attention' or 'gated'"
            )
        self.method: Pooling = method
        self.leak_padding = leak_padding
        if method == "gated":
            self.gate = nn.Linear(2 * channels, channels)
        if method == "attention":
            self.query = nn.Parameter(torch.randn(channels) / channels**0.5)
            self.attention = MultiHeadAttention(channels, 1, attention_dropout=dropout)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Args: tokens (B, N, s, C), zero where `mask` (B, N, s) is False. Returns (B, N, C)."""
        if self.leak_padding:
            mask = torch.ones_like(mask)
        if self.method == "mean":
            return self._mean(tokens, mask)
        if self.method == "max":
            return self._max(tokens, mask)
        if self.method == "gated":
            mean, high = self._mean(tokens, mask), self._max(tokens, mask)
            share = self.gate(torch.cat([mean, high], -1)).sigmoid()
            return torch.lerp(mean, high, share.to(mean.dtype))  # autocast makes it narrower
        return self._attended(tokens, mask)

    @staticmethod
    def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens.sum(2) / mask.sum(2, keepdim=True).clamp(min=1)

    @staticmethod
    def _max(tokens: Tensor, mask: Tensor) -> Tensor:
        lowest = torch.finfo(tokens.dtype).min
        high = tokens.masked_fill(~mask[..., None], lowest).amax(2)
        return high.masked_fill(~mask.any(2)[..., None], 0.0)

    def _attended(self, tokens: Tensor, mask: Tensor) -> Tensor:
        batch, count = mask.shape[:2]
        groups, valid = tokens.flatten(0, 1), mask.flatten(0, 1)
        some = valid.any(1, keepdim=True)
        row = torch.zeros(len(groups), dtype=torch.long, device=tokens.device)
        query = self.query.to(tokens.dtype).view(1, 1, -1)
        # A group without valid tokens attends to all, and is silenced after.
        found = self.attention(query, groups, groups, valid | ~some, row)
        return found.squeeze(1).masked_fill(~some, 0.0).unflatten(0, (batch, count))


def group(x: Tensor, mask: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Cut (B, T, C) and its mask (B, T) into groups: (B, N, stride, C) and (B, N, stride).

    N is ceil(T / stride); the last group is filled up with invalid zeros.
    """
    missing = -x.shape[1] % stride
    if missing:
        x, mask = F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    return x.unflatten(1, (-1, stride)), mask.unflatten(1, (-1, stride))


def interleave(anchors: Tensor, tokens: Tensor) -> Tensor:
    """[a0, t0, t1, a1, ...] of anchors (B, N, ...) and tokens (B, N, s, ...).

    Returns:
        (B, N * (s + 1), ...)
    """
    return torch.cat([anchors.unsqueeze(2), tokens], 2).flatten(1, 2)


def separate(x: Tensor, stride: int, length: int) -> tuple[Tensor, Tensor]:
    """Undo `interleave`: anchors (B, N, C) and the first `length` tokens (B, length, C)."""
    groups = x.unflatten(1, (-1, stride + 1))
    return groups[:, :, 0], groups[:, :, 1:].flatten(1, 2)[:, :length]
