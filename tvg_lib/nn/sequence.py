"""Masked operations on (B, T, C) sequences.

Convolutions here read zeros beyond the ends of a sequence *and* at its padding, so the two cannot
be told apart: that is what makes every model of this library invariant to padding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.convolution import depthwise_convolution, thin_convolution
from tvg_lib.nn.winograd import winograd_convolution

# Steps and channels from which Winograd's transformations pay: of 1,143 steps on one thread, there
# and back take 1.6 times as long as a plain convolution at 64 channels, 0.8 at 128 and 0.6 at 256.
LONG, WIDE = 256, 128


def zero_invalid(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (B, T, C) with zeros where `mask` (B, T) is False; `x` itself where it never is."""
    if mask.device.type == "cpu":  # elsewhere the answer would have to wait
        return x if bool(mask.all()) else _Zeroed.apply(x, mask)
    return torch.where(mask[..., None], x, 0.0)


class _Zeroed(torch.autograd.Function):
    """A copy in which only the invalid steps are written: on a CPU faster than choosing by mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.invalid = (~mask).nonzero(as_tuple=True)
        return x.clone(memory_format=torch.contiguous_format).index_put_(
            ctx.invalid, x.new_zeros(())
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.clone().index_put_(ctx.invalid, dy.new_zeros(())), None


def repeat_rows(x: Tensor, row: Tensor) -> Tensor:
    """`x[row]`; of a single row a view, without a copy."""
    return x.expand(len(row), *x.shape[1:]) if len(x) == 1 else x.index_select(0, row)


def pad_time(x: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Append invalid steps until T is a multiple of `multiple`."""
    missing = -x.shape[1] % multiple
    if missing == 0:
        return x, mask
    return F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing))


class MaskedConv1d(nn.Conv1d):
    """A convolution over time of (B, T, C) that reads zeros at invalid positions.

    With `stride` s the output has T/s steps, step t standing where input step s*t stood; T must be
    a multiple of s.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=bias,
        )
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Args: x (B, T, C_in), mask (B, T). Returns (B, T/stride, C_out) and its mask."""
        stride = self.stride[0]
        if x.shape[1] % stride:
            raise ValueError(f"{x.shape[1]} steps are not a multiple of the stride {stride}")
        return self._convolve(x, mask), mask[:, ::stride]

    def _convolve(self, x: Tensor, mask: Tensor) -> Tensor:
        """The convolution; three taps on a CPU by the fastest of the exact ways."""
        fast = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        fast = fast and self.kernel_size == (3,)
        if fast and self.groups == self.in_channels == self.out_channels:
            bias = self.weight.new_zeros(self.groups) if self.bias is None else self.bias
            x = zero_invalid(x, mask)
            y = depthwise_convolution(x, self.weight.squeeze(1), bias, before=1, after=1)
            return y[:, :: self.stride[0]]  # twice the arithmetic costs less than transposing
        fast = fast and self.stride == (1,)
        thin = 3 * self.out_channels <= self.in_channels
        large = x.shape[1] >= LONG and min(self.in_channels, self.out_channels) >= WIDE
        if fast and self.groups == 1 and large and not thin:
            y = winograd_convolution(x, mask, self.weight)
            return y if self.bias is None else y + self.bias
        x = zero_invalid(x, mask)
        if fast and self.groups == 1 and thin:
            y = thin_convolution(x, self.weight)
            return y if self.bias is None else y + self.bias
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def masked_max_pool(x: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Maximum over windows of three steps centred on every `stride`-th step; (B, T/stride, C).

    Invalid steps never win; a window without a valid step gives zero.
    """
    lowest = torch.finfo(x.dtype).min
    x = x.masked_fill(~mask[..., None], lowest).transpose(1, 2)
    pooled = F.max_pool1d(x, kernel_size=3, stride=stride, padding=1).transpose(1, 2)
    return pooled.masked_fill(pooled == lowest, 0.0)


class LayerScale(nn.Module):
    """A learnt scale per channel on a residual branch, with stochastic depth per sample.

    Source: Touvron et al. 2021 (scale); the start 1e-4 is that of SnAG's released code.
    """

    def __init__(self, channels: int, drop_path: float = 0.0, init: float = 1e-4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), init))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x * self.scale
        keep = 1 - self.drop_path
        alive = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep
        return x * (self.scale * (alive.to(x.dtype) / keep))


class SinusoidalPositions(nn.Module):
    """Adds sine-cosine position codes, scaled by 1/sqrt(C), to valid positions.

    A sequence longer than `max_length` gets the trained codes stretched over it by linear
    interpolation, so that first and last positions keep their codes. The length that counts is the
    number of valid steps of each row.

    Attributes:
        stretch_over_padding: take the padded length instead, as SnAG's released code does. Codes
            then depend on padding; only of use for matching released results.
    """

    def __init__(self, channels: int, max_length: int, stretch_over_padding: bool = False) -> None:
        super().__init__()
        self.max_length = max_length
        self.stretch_over_padding = stretch_over_padding
        # On the CPU whatever the default device: a model built on "meta" keeps its codes.
        frequencies = 10000.0 ** -torch.linspace(0, 1, channels // 2 + 1, device="cpu")[:-1]
        angles = torch.arange(max_length, device="cpu")[:, None] * frequencies
        table = torch.cat([angles.sin(), angles.cos()], dim=1) / math.sqrt(channels)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (B, T, C), mask (B, T). Returns (B, T, C)."""
        steps = x.shape[1]
        lengths = (
            mask.sum(1)
            if not self.stretch_over_padding
            else mask.new_full((1,), steps, dtype=torch.long)
        )
        if steps <= self.max_length or int(lengths.max()) <= self.max_length:
            codes = F.pad(self.table[:steps], (0, 0, 0, max(0, steps - self.max_length)))
        else:
            codes = self._stretched(lengths, steps)
        return x + zero_invalid(codes.to(x.dtype).expand_as(x), mask)

    def _stretched(self, lengths: Tensor, steps: int) -> Tensor:
        """(rows, T, C) codes read between the rows of the table."""
        # In whole numbers: a row that needs no stretching reads the table's own rows, exactly.
        last = self.max_length - 1
        steps_to_last = (lengths - 1).clamp(min=max(last, 1))[:, None]
        numerator = torch.arange(steps, device=lengths.device) * last
        below = (numerator // steps_to_last).clamp(max=last)
        above = (below + 1).clamp(max=last)
        share = ((numerator % steps_to_last) / steps_to_last)[..., None]
        return self.table[below] * (1 - share) + self.table[above] * share
