"""The feed-forward network of a transformer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.dropout import Dropout, RandomBits
from tvg_lib.nn.gradients import first_order

ROWS = 512  # at a time: what is between the two layers then stays in the cache
DROPPED = -100.0  # GELU and its slope are zero here


class FeedForward(nn.Sequential):
    """Linear, GELU, linear, each with dropout."""

    def __init__(self, channels: int, expansion: int = 4, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(channels, channels * expansion),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(channels * expansion, channels),
            Dropout(dropout),
        )
        for layer in (self[0], self[3]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., C). Returns (..., C)."""
        inner, _, dropout, outer, last = self
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or dropout.p == 1:
            return super().forward(x)
        weights = (inner.weight, inner.bias, outer.weight, outer.bias)
        return last(_FeedForward.apply(x, *weights, dropout, torch.is_grad_enabled()))


class _FeedForward(torch.autograd.Function):
    """Linear, GELU, dropout, linear on a few rows at a time, forth and back.

    Of the wide rows between the layers only those before GELU are saved. A unit is dropped by a
    value there at which GELU and its slope vanish, so the way back needs no mask; the factor on
    those that stay goes into the second product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor,
        inner_bias: Tensor,
        outer: Tensor,
        outer_bias: Tensor,
        dropout: Dropout,
        saved: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        wide = rows.new_empty(len(rows) if saved else min(ROWS, len(rows)), len(inner))
        y = rows.new_empty(len(rows), len(outer))
        dropped = rows.new_tensor(DROPPED)
        bits = RandomBits() if dropout.active else None
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            before = wide[part] if saved else wide[: len(rows) - start]
            torch.addmm(inner_bias, rows[part], inner.t(), out=before)
            if bits is not None:
                torch.where(bits.keep(before.shape, dropout.p), before, dropped, out=before)
            torch.addmm(outer_bias, F.gelu(before), outer.t(), alpha=dropout.scale, out=y[part])
        ctx.scale, ctx.shape = dropout.scale, x.shape
        ctx.save_for_backward(rows, wide, inner, outer)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, wide, inner, outer = ctx.saved_tensors
        dy = dy.reshape(len(rows), -1)
        dx = torch.empty_like(rows)
        dinner, douter = torch.zeros_like(inner), torch.zeros_like(outer)
        dinner_bias = inner.new_zeros(len(inner))
        scaled = outer * ctx.scale
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            before, above = wide[part], dy[part]
            after, dafter = F.gelu(before), above @ scaled
            dbefore = torch.ops.aten.gelu_backward(dafter, before)
            douter.addmm_(above.t(), after, alpha=ctx.scale)
            dinner.addmm_(dbefore.t(), rows[part])
            dinner_bias += dbefore.sum(0)
            torch.mm(dbefore, inner, out=dx[part])
        return dx.view(ctx.shape), dinner, dinner_bias, douter, dy.sum(0), None, None
