"""Convolution with three taps in half the multiplications (Winograd 1980; Lavin and Gray 2016).

The smallest algorithm of its kind for four outputs of a three-tap filter, F(4, 3): six inputs d and
three taps g give

    y = A [(G g) * (B d)]        A (4, 6), G (6, 3), B (6, 6), * element by element

with six products where the definition takes twelve. Over channels each product is a matrix product,
so a convolution is six of them on a quarter of the steps. In float32 the result differs from the
definition's by about 1e-5 of the output's size, from rounding alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tvg_lib.nn.gradients import first_order

OUTPUTS, INPUTS = 4, 6  # of a tile
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


STEPS = 1024  # at a time: what is between the three products then stays in the cache


def winograd_convolution(x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """`F.conv1d(padding=1)` by a weight (O, C, 3), without bias, that reads zeros at invalid steps.

    Args: x (B, T, C), mask (B, T). Returns (B, T, O).
    """
    return _Winograd.apply(x, mask, weight)


class _Winograd(torch.autograd.Function):
    """Saves the input alone; its tiles are transformed again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask, weight)
        return _convolve(x, mask, _filters(weight, _FILTER).mT)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, mask, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:  # the same convolution from outputs to inputs, taps reversed
            reverse = tuple(row[::-1] for row in _FILTER)
            dx = _convolve(dy, torch.ones_like(mask), _filters(weight, reverse))
            dx[~mask] = 0.0
        if ctx.needs_input_grad[2]:
            outputs, channels, taps = weight.shape
            dfilters = x.new_zeros(INPUTS, outputs, channels)
            for row, valid, drow in zip(x, mask, dy, strict=True):
                for tiles, dpart in zip(_tiles(row, valid), drow.split(STEPS), strict=True):
                    dpart = F.pad(dpart, (0, 0, 0, -len(dpart) % OUTPUTS)).unflatten(
                        0, (-1, OUTPUTS)
                    )
                    dproducts = _transform(_OUTPUT, dpart, transpose=True)
                    dfilters.baddbmm_(
                        dproducts.permute(1, 2, 0), _transform(_INPUT, tiles).transpose(0, 1)
                    )
            dweight = x.new_tensor(_FILTER).t() @ dfilters.flatten(1)
            dweight = dweight.view(taps, outputs, channels).permute(1, 2, 0).contiguous()
        return dx, None, dweight


def _filters(weight: Tensor, matrix: tuple) -> Tensor:
    """The six matrices (6, O, C) of a weight (O, C, 3)."""
    outputs, channels, taps = weight.shape
    return (weight.new_tensor(matrix) @ weight.view(-1, taps).t()).view(-1, outputs, channels)


def _convolve(x: Tensor, mask: Tensor, filters: Tensor) -> Tensor:
    """The convolution by filters (6, C, O)."""
    batch, steps, _ = x.shape
    y = x.new_empty(batch, steps + -steps % OUTPUTS, filters.shape[2])  # the last tile sticks out
    for row, valid, out in zip(x, mask, y, strict=True):
        for tiles, part in zip(_tiles(row, valid), out.split(STEPS), strict=True):
            products = torch.bmm(_transform(_INPUT, tiles).transpose(0, 1), filters)
            place = part.unflatten(0, (-1, OUTPUTS))
            _transform(_OUTPUT, products.transpose(0, 1), out=place)
    return y[:, :steps]


def _tiles(row: Tensor, valid: Tensor) -> Iterator[Tensor]:
    """Overlapping tiles (n, 6, C) of a sequence (T, C), zero outside and at invalid steps.

    Those of the first `STEPS` steps come first, and so on.
    """
    invalid = (~valid).nonzero().squeeze(1)
    for start in range(0, len(row), STEPS):
        steps = min(STEPS, len(row) - start)
        padded = row.new_zeros(steps + -steps % OUTPUTS + INPUTS - OUTPUTS, row.shape[1])
        first, last = max(start - 1, 0), min(start + len(padded) - 1, len(row))
        place = padded[first - start + 1 : last - start + 1].copy_(row[first:last])
        here = invalid[(invalid >= first) & (invalid < last)]
        if len(here):
            place.index_fill_(0, here - first, 0.0)
        yield padded.unfold(0, INPUTS, OUTPUTS).transpose(1, 2)


def _transform(
    matrix: tuple, tiles: Tensor, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """A small constant matrix from the left on every tile (tiles, n, C)."""
    factor = tiles.new_tensor(matrix)
    factor = factor.t() if transpose else factor
    return torch.bmm(factor.expand(len(tiles), -1, -1), tiles, out=out)
