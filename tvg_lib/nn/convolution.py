"""Two special convolutions along time of (B, T, C), each faster on a CPU than the general one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tvg_lib.nn.gradients import first_order


def thin_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv1d(padding=1)` by a weight (O, C, 3) with few outputs O; (B, T, O).

    First one product over the channels, then the (now narrow) results of the taps are shifted.
    """
    taps = F.linear(x, weight.permute(2, 0, 1).flatten(0, 1)).unflatten(-1, (3, -1))
    before, here, after = taps.unbind(-2)
    return F.pad(before[:, :-1], (0, 0, 1, 0)) + here + F.pad(after[:, 1:], (0, 0, 0, 1))


def depthwise_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, before: int, after: int
) -> Tensor:
    """y_t = bias + sum_k w_k x_{t + k - before}, zeros outside.

    Args:
        x: (B, T, C).
        weight: (C, K).
        bias: (C,).
        before, after: how many zeros stand in front of the sequence and behind it.

    Returns:
        (B, T + before + after - K + 1, C)
    """
    return _Depthwise.apply(x, weight, bias, before, after)


class _Depthwise(torch.autograd.Function):
    """y_t = bias + sum_k w_k x_{t + k - before} on (B, T, C), zeros outside.

    As a channels-last 2-D convolution, for which (B, T, C) is the native layout: about ten times
    faster on the CPU than transposing. PyTorch's backward of it is not, hence the one here.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, before: int, after: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.before = before
        length = x.shape[1] + before + after - weight.shape[1] + 1
        with torch.autocast(x.device.type, enabled=False):
            return _convolve(x, weight, bias, before, length)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps, length = weight.shape[1], x.shape[1]
        kind = torch.promote_types(x.dtype, torch.float32)
        dweight = torch.zeros(taps, weight.shape[0], dtype=kind, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            dx = _convolve(dy, weight.flip(1), None, taps - 1 - ctx.before, length)
            for start in range(0, dy.shape[1], 512):  # short enough to stay in the cache
                part = dy[:, start : start + 512].to(kind)
                for k in range(taps):
                    offset = start + k - ctx.before
                    first, last = max(offset, 0), min(offset + part.shape[1], length)
                    if first < last:
                        seen = x[:, first:last]
                        dweight[k] += (part[:, first - offset : last - offset] * seen).sum((0, 1))
            dbias = dy.sum((0, 1), dtype=kind)
        return dx, dweight.t().to(weight.dtype), dbias.to(weight.dtype), None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, before: int, length: int) -> Tensor:
    """The first `length` steps of y_t = bias + sum_k w_k x_{t + k - before}; weight (C, K)."""
    padding = max(before, length - x.shape[1] + weight.shape[1] - 1 - before)
    rows = x.contiguous().transpose(1, 2).unsqueeze(2)  # a copy costs less than a strided read
    y = F.conv2d(rows, weight[:, None, None], bias, padding=(0, padding), groups=weight.shape[0])
    return y.squeeze(2).transpose(1, 2)[:, padding - before : padding - before + length]
