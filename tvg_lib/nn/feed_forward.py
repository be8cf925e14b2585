"""The feed-forward network of a transformer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.dropout import Dropout

ROWS = 1024  # at a time: what is between the two layers then stays in the cache


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
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        keep = dropout.draw(x.shape[:-1] + inner.bias.shape, x.device)
        scale = 1.0 if keep is None else dropout.scale
        return last(
            _FeedForward.apply(x, inner.weight, inner.bias, outer.weight, outer.bias, keep, scale)
        )


class _FeedForward(torch.autograd.Function):
    """Linear, GELU, dropout, linear on a few rows at a time, forth and back.

    Of the wide rows between the layers only those before GELU are saved. Dropout's factor goes into
    the second product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor,
        inner_bias: Tensor,
        outer: Tensor,
        outer_bias: Tensor,
        keep: Tensor | None,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        keep = None if keep is None else keep.view(len(rows), -1)
        zero = rows.new_zeros(())
        saved = any(ctx.needs_input_grad)
        wide = rows.new_empty(len(rows) if saved else min(ROWS, len(rows)), len(inner))
        y = rows.new_empty(len(rows), len(outer))
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            before = wide[part] if saved else wide[: len(rows) - start]
            torch.addmm(inner_bias, rows[part], inner.t(), out=before)
            after = F.gelu(before)
            if keep is not None:
                torch.where(keep[part], after, zero, out=after)
            torch.addmm(outer_bias, after, outer.t(), alpha=scale, out=y[part])
        ctx.scale, ctx.shape = scale, x.shape
        ctx.save_for_backward(rows, wide, inner, outer, keep)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, wide, inner, outer, keep = ctx.saved_tensors
        dy = dy.reshape(len(rows), -1)
        dx, zero = torch.empty_like(rows), rows.new_zeros(())
        dinner, douter = torch.zeros_like(inner), torch.zeros_like(outer)
        dinner_bias = inner.new_zeros(len(inner))
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            before, above = wide[part], dy[part]
            after, dafter = F.gelu(before), (above * ctx.scale) @ outer
            if keep is not None:
                torch.where(keep[part], after, zero, out=after)
                torch.where(keep[part], dafter, zero, out=dafter)
            dbefore = torch.ops.aten.gelu_backward(dafter, before)
            douter.addmm_(above.t(), after, alpha=ctx.scale)
            dinner.addmm_(dbefore.t(), rows[part])
            dinner_bias += dbefore.sum(0)
            torch.mm(dbefore, inner, out=dx[part])
        return dx.view(ctx.shape), dinner, dinner_bias, douter, dy.sum(0), None, None
