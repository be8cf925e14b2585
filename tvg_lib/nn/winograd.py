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
        return _convolve(x, mask, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, mask, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:  # the same convolution, taps reversed
            dx = _convolve(dy, torch.ones_like(mask), weight.flip(2).transpose(0, 1))
            dx.masked_fill_(~mask[..., None], 0.0)
        if ctx.needs_input_grad[2]:
            dfilters = x.new_zeros(INPUTS, weight.shape[1], weight.shape[0])
            for row, valid, drow in zip(x, mask, dy, strict=True):
                tiles = _tiles(row, valid)
                drow = F.pad(drow, (0, 0, 0, len(tiles) * OUTPUTS - len(drow)))
                dproducts = _transform(_OUTPUT, drow.view(len(tiles), OUTPUTS, -1), transpose=True)
                dfilters.baddbmm_(
                    _transform(_INPUT, tiles).permute(1, 2, 0), dproducts.transpose(0, 1)
                )
            dweight = torch.einsum("jk,jio->oik", x.new_tensor(_FILTER), dfilters)
        return dx, None, dweight


def _convolve(x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """The convolution, one sequence at a time: what is between its steps stays in the cache."""
    filters = torch.einsum("jk,oik->jio", x.new_tensor(_FILTER), weight)  # (6, C, O)
    y = x.new_empty(len(x), x.shape[1], weight.shape[0])
    whole = x.shape[1] // OUTPUTS  # tiles that fit; the last may stick out
    for row, valid, out in zip(x, mask, y, strict=True):
        products = _transform(_INPUT, _tiles(row, valid)).transpose(0, 1) @ filters
        products = products.transpose(0, 1)  # (tiles, 6, O)
        fitting = out[: whole * OUTPUTS].view(whole, OUTPUTS, out.shape[1])
        _transform(_OUTPUT, products[:whole], out=fitting)
        rest = out[whole * OUTPUTS :]
        if len(rest):
            rest.copy_(_transform(_OUTPUT, products[whole:])[0, : len(rest)])
    return y


def _tiles(row: Tensor, valid: Tensor) -> Tensor:
    """Overlapping tiles (tiles, 6, C) of a sequence (T, C), zero outside and at invalid steps."""
    steps = len(row)
    tiles = -(-steps // OUTPUTS)
    padded = row.new_empty(tiles * OUTPUTS + INPUTS - OUTPUTS, row.shape[1])
    padded[0] = 0.0
    padded[steps + 1 :] = 0.0
    torch.where(valid[:, None], row, row.new_zeros(()), out=padded[1 : steps + 1])
    return padded.unfold(0, INPUTS, OUTPUTS).transpose(1, 2)


def _transform(
    matrix: tuple, tiles: Tensor, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """A small constant matrix from the left on every tile (tiles, n, C)."""
    factor = tiles.new_tensor(matrix)
    factor = (factor.t() if transpose else factor).expand(len(tiles), -1, -1)
    return torch.bmm(factor, tiles, out=out)
