"""Convolutions with large square kernels over (Q, C, N, M) maps, exact and fast on a CPU.

A 21 x 21 kernel over a 75 x 75 map costs 441 multiplications per cell and pair of channels. By the
convolution theorem the same sums cost a few Fourier transforms and one product per frequency. The
maps are padded with just enough zeros that the circular convolution of the transform equals the
linear one on the cells that are kept, so the result is exact up to rounding. Measured against
PyTorch's direct convolution in `benchmarks/similarity_map.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.gradients import first_order

DIRECT_UP_TO = 5  # small kernels cost less directly than their transforms


def fast_length(least: int) -> int:
    """The smallest even length of at least `least` whose only prime factors are 2, 3 and 5."""
    length = least + least % 2
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2


class _FourierConvolution(torch.autograd.Function):
    """Zero-padded "same" cross-correlation; one product per frequency, forward and backward.

    The transforms of input and kernel are kept for the backward pass, so that it needs one
    transform of the gradient and two inverse ones.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        half = weight.shape[-1] // 2
        # Wrapped-around sums land on the `half` cells behind the map, which are cut off.
        size = (fast_length(rows + half), fast_length(columns + half))
        x_hat = torch.fft.rfft2(x, s=size)  # (Q, I, F, G)
        w_hat = torch.fft.rfft2(_centred(weight, size))  # (O, I, F, G)
        y = torch.fft.irfft2(_mix(x_hat, _blocks(w_hat.conj())), s=size)
        ctx.save_for_backward(x_hat, w_hat)
        ctx.sizes = (rows, columns, size, weight.shape[-1])
        return y[..., :rows, :columns]

    @staticmethod
    @first_order
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_hat, w_hat = ctx.saved_tensors
        rows, columns, size, kernel = ctx.sizes
        g_hat = torch.fft.rfft2(gradient, s=size)  # (Q, O, F, G)
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            blocks = _blocks(w_hat.transpose(0, 1))
            x_gradient = torch.fft.irfft2(_mix(g_hat, blocks), s=size)
            x_gradient = x_gradient[..., :rows, :columns]
        if ctx.needs_input_grad[1]:
            # Correlation of input and gradient, read at the shifts that the kernel has.
            blocks = _blocks(x_hat.transpose(0, 1))
            product = _mix(g_hat.conj().transpose(0, 1), blocks)  # (O, I, F, G)
            shifts = torch.fft.irfft2(product, s=size)
            half = kernel // 2
            weight_gradient = shifts.roll((half, half), (-2, -1))[..., :kernel, :kernel]
        return x_gradient, weight_gradient


def _blocks(w: Tensor) -> Tensor:
    """A kernel's transform (O, I, F, G) as real matrices (FG, 2 I, 2 O), one per frequency.

    Complex numbers as pairs of reals, a factor c + di as a 2 x 2 block: a batch of small complex
    products is several times slower than one of real products twice as wide.
    """
    real, imaginary = torch.view_as_real(w.resolve_conj()).flatten(2, 3).permute(3, 2, 1, 0)
    blocks = torch.stack(
        [torch.stack([real, imaginary], -1), torch.stack([-imaginary, real], -1)], dim=2
    )  # (FG, I, 2, O, 2)
    return blocks.flatten(3).flatten(1, 2)


def _mix(x: Tensor, blocks: Tensor) -> Tensor:
    """Sum over channels at every frequency: (Q, I, F, G), (FG, 2 I, 2 O) to (Q, O, F, G)."""
    pairs = torch.view_as_real(x.resolve_conj()).flatten(2, 3)  # (Q, I, FG, 2)
    pairs = pairs.permute(2, 0, 1, 3).flatten(2)  # (FG, Q, 2 I)
    mixed = torch.bmm(pairs, blocks).unflatten(-1, (-1, 2)).permute(1, 2, 0, 3)
    return torch.view_as_complex(mixed.contiguous()).unflatten(-1, x.shape[-2:])


def _centred(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """(O, I, *size): the kernel in zeros, its middle at the origin."""
    half = weight.shape[-1] // 2
    missing = (size[1] - weight.shape[-1], size[0] - weight.shape[-2])
    padded = F.pad(weight, (0, missing[0], 0, missing[1]))
    return padded.roll((-half, -half), (-2, -1))


def fourier_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(x, weight, padding="same")` for an odd square kernel, by Fourier transforms.

    Args:
        x: (Q, I, N, M) of at least the kernel's size in both directions.
        weight: (O, I, C, C) with C odd.

    Returns:
        (Q, O, N, M); computed in float32 at least.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return _FourierConvolution.apply(x.to(dtype), weight.to(dtype))


class SquareConvolution(nn.Conv2d):
    """A convolution over maps with zero padding; large kernels go through Fourier transforms.

    Args:
        in_channels, out_channels: of the maps.
        kernel_size: odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"a centred kernel has an odd size, found {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
        self._ready: tuple[tuple, Tensor] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_ready": None}

    def train(self, mode: bool = True) -> "SquareConvolution":
        """Also forgets the kernel kept ready, for weights that were changed behind its back."""
        self._ready = None
        return super().train(mode)

    def _without_gradient(self, x: Tensor) -> Tensor:
        """`fourier_convolution` whose kernel is transformed once, until the weights change.

        With one map a call, the transforms of the kernels would be most of the work.
        """
        rows, columns = x.shape[-2:]
        half = self.kernel_size[0] // 2
        size = (fast_length(rows + half), fast_length(columns + half))
        weight = self.weight
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            key = (size, dtype, weight.device, weight.data_ptr(), weight._version)
            if self._ready is None or self._ready[0] != key:
                w_hat = torch.fft.rfft2(_centred(weight.detach().to(dtype), size))
                self._ready = (key, _blocks(w_hat.conj()))
            mixed = _mix(torch.fft.rfft2(x.to(dtype), s=size), self._ready[1])
            return torch.fft.irfft2(mixed, s=size)[..., :rows, :columns]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (Q, C, N, M), mask (Q, 1, N, M); invalid cells are read as zero."""
        x = torch.where(mask, x, 0.0)
        kernel = self.kernel_size[0]
        if kernel <= DIRECT_UP_TO or min(x.shape[-2:]) < kernel:
            return super().forward(x)
        # Weights that were made in inference mode do not say when they change.
        if torch.is_grad_enabled() or self.weight.is_inference():
            return fourier_convolution(x, self.weight) + self.bias[:, None, None]
        return self._without_gradient(x) + self.bias[:, None, None]

    def multiplications(self, rows: int, columns: int) -> dict[str, int]:
        """Real multiplications per map of the direct and (about) of the Fourier way."""
        channels = self.in_channels * self.out_channels
        half = self.kernel_size[0] // 2
        cells = fast_length(rows + half) * fast_length(columns + half)
        transforms = (self.in_channels + self.out_channels) * cells * math.log2(cells)
        return {
            "direct": self.kernel_size[0] ** 2 * channels * rows * columns,
            "fourier": round(2 * channels * cells + 2 * transforms),
        }
