"""Convolution with three taps in half the multiplications (Winograd 1980; Lavin and Gray 2016).

The smallest algorithm of its kind for four outputs of a three-tap filter, F(4, 3): six inputs d and
three taps g give

    y = A [(G g) * (B d)]        A (4, 6), G (6, 3), B (6, 6), * element by element

with six products where the definition takes twelve. Over channels each product is a matrix product,
so a convolution is six of them on a quarter of the steps. In float32 the result differs from the
definition's by about 1e-5 of the output's size, from rounding alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def winograd_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv1d(padding=1)` of (B, T, C) by a weight (O, C, 3), without bias; (B, T, O)."""
    return _Winograd.apply(x, weight)


class _Winograd(torch.autograd.Function):
    """Saves the input alone; its tiles are transformed again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:  # the same convolution, taps reversed
            dx = _convolve(dy, weight.flip(2).transpose(0, 1))
        if ctx.needs_input_grad[1]:
            dfilters = x.new_zeros(INPUTS, weight.shape[1], weight.shape[0])
            tiles = -(-x.shape[1] // OUTPUTS)
            for row, drow in zip(_pad(x), dy, strict=True):
                drow = F.pad(drow, (0, 0, 0, tiles * OUTPUTS - len(drow)))
                dproducts = _transform(_OUTPUT, drow.view(tiles, OUTPUTS, -1), transpose=True)
                dfilters.baddbmm_(
                    _transform(_INPUT, _tiles(row)).permute(1, 2, 0), dproducts.transpose(0, 1)
                )
            dweight = torch.einsum("jk,jio->oik", x.new_tensor(_FILTER), dfilters)
        return dx, dweight


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution, one sequence at a time: what is between its steps stays in the cache."""
    filters = torch.einsum("jk,oik->jio", x.new_tensor(_FILTER), weight)  # (6, C, O)
    y = x.new_empty(len(x), x.shape[1], weight.shape[0])
    whole = x.shape[1] // OUTPUTS  # tiles that fit; the last may stick out
    for row, out in zip(_pad(x), y, strict=True):
        products = _transform(_INPUT, _tiles(row)).transpose(0, 1) @ filters  # (6, tiles, O)
        products = products.transpose(0, 1)
        fitting = out[: whole * OUTPUTS].view(whole, OUTPUTS, out.shape[1])
        _transform(_OUTPUT, products[:whole], out=fitting)
        rest = out[whole * OUTPUTS :]
        if len(rest):
            rest.copy_(_transform(_OUTPUT, products[whole:])[0, : len(rest)])
    return y


def _pad(x: Tensor) -> Tensor:
    """One zero in front, and zeros behind until tiles of six at a stride of four fit."""
    return F.pad(x, (0, 0, 1, -x.shape[1] % OUTPUTS + 1))


def _tiles(row: Tensor) -> Tensor:
    """(tiles, 6, C), a view of (4 * tiles + 2, C)."""
    return row.unfold(0, INPUTS, OUTPUTS).transpose(1, 2)


def _transform(
    matrix: tuple, tiles: Tensor, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """A small constant matrix from the left on every tile (tiles, n, C)."""
    factor = tiles.new_tensor(matrix)
    factor = (factor.t() if transpose else factor).expand(len(tiles), -1, -1)
    return torch.bmm(factor, tiles, out=out)
