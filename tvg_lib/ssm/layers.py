"""The layers around the scans: Mamba (S6), Mamba2 (SSD) and Hydra (two SSD passes).

All take and return (B, T, C) and hold their parameters under the published names and shapes, so a
released state dict loads as it is. Pipeline of each: one input projection, a short depthwise
convolution with SiLU, the scan, a gate, the output projection.

Padding. With a mask, padded steps are silent: the convolution sees zeros there, the scan neither
reads nor writes there, the output is zero there, and no valid output depends on how much padding a
batch adds at either end. The published code passes no mask. There, padding that the caller has set
to zero leaves the convolution as its bias, not as zero, and writes to the state; forwards that
comes too late to matter, but the backward scan of Hydra meets it first. `leak_padding=True`
reproduces this, to match numbers of released checkpoints.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.nn.convolution import depthwise_convolution
from tvg_lib.nn.gradients import first_order
from tvg_lib.ssm import kernels
from tvg_lib.ssm.kernels import Backend
from tvg_lib.ssm.s6 import s6_scan
from tvg_lib.ssm.ssd import ssd_scan


class MambaState(NamedTuple):
    """What a one-directional layer remembers between two pieces of a sequence."""

    conv: Tensor
    """(B, d_conv - 1, C): the last inputs of the convolution."""
    scan: Tensor
    """The scan's state: (B, D, N) for Mamba, (B, H, P, N) for Mamba2."""


class DepthwiseConv(nn.Conv1d):
    """Depthwise convolution along time with SiLU, on (B, T, C). Parameters as in `nn.Conv1d`."""

    def __init__(self, channels: int, kernel_size: int, bias: bool, causal: bool) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels, bias=bias)
        self.causal = causal

    def forward(
        self, x: Tensor, history: Tensor | None = None, backend: Backend = "auto"
    ) -> Tensor:
        """Convolve, then SiLU. `history` (B, d_conv - 1, C) precedes `x`; zeros if None."""
        size = self.kernel_size[0]
        fits = self.causal and history is None and 2 <= size <= 4 and self.groups % 8 == 0
        if fits and x.is_cuda and x.dtype != torch.float64 and backend in ("auto", "mamba_ssm"):
            kernel = kernels.causal_conv1d().call
            if kernel is not None:
                if x.stride(0) % 8 or x.stride(1) % 8:  # what the kernel asks of channels-last
                    x = x.contiguous()
                weight = self.weight.squeeze(1)
                y = kernel(x.transpose(1, 2), weight, self.bias, activation="silu")
                return y.transpose(1, 2)
        before = size - 1 if self.causal else size // 2
        if history is None:
            after = 0 if self.causal else size // 2
        else:
            x = torch.cat([history.to(x.dtype), x], 1)
            before = after = 0
        weight = self.weight.squeeze(1).to(x.dtype)
        bias = x.new_zeros(self.groups) if self.bias is None else self.bias.to(x.dtype)
        return F.silu(depthwise_convolution(x, weight, bias, before, after))

    def tail(self, x: Tensor, history: Tensor | None, mask: Tensor | None) -> Tensor:
        """The `history` with which the sequence would go on: inputs up to the last valid step."""
        size = self.kernel_size[0] - 1
        if history is None:
            history = x.new_zeros(x.shape[0], size, x.shape[2])
        x = torch.cat([history.to(x.dtype), x], 1)
        if mask is None:
            return x[:, x.shape[1] - size :]
        steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        ends = (mask * steps).amax(1)  # length up to the last valid step, 0 if there is none
        rows = ends[:, None] + torch.arange(size, device=mask.device)
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


class GatedRMSNorm(nn.Module):
    """RMS norm with a SiLU gate, before or after it (Dao and Gu 2024, section 7; mamba-ssm).

    norm_before_gate=False (Mamba2): norm(y * SiLU(z)); True (Hydra): norm(y) * SiLU(z).
    `groups` > 1 normalises each of so many equal parts of the channels by itself.
    """

    def __init__(
        self, width: int, norm_before_gate: bool, groups: int = 1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.norm_before_gate = norm_before_gate
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor, backend: Backend = "auto") -> Tensor:
        """Norm and gate of (B, T, C); computed in float32 at least, returned in `y`'s type."""
        if y.is_cuda and y.dtype != torch.float64 and backend in ("auto", "mamba_ssm"):
            kernel = kernels.gated_rms_norm().call
            if kernel is not None:
                return kernel(
                    y,
                    self.weight,
                    None,
                    z=z,
                    eps=self.eps,
                    group_size=self.weight.shape[0] // self.groups,
                    norm_before_gate=self.norm_before_gate,
                )
        kind = torch.promote_types(y.dtype, torch.float32)
        out = y.to(kind)
        gate = F.silu(z.to(kind))
        if not self.norm_before_gate:
            out = out * gate
        size = out.shape[-1] // self.groups
        parts = out.unflatten(-1, (self.groups, size))
        norm = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
        out = (parts * torch.rsqrt(norm.square() / size + self.eps)).flatten(-2) * self.weight
        if self.norm_before_gate:
            out = out * gate
        return out.to(y.dtype)


def _step_bias(width: int, lowest: float, highest: float, floor: float) -> Tensor:
    """Biases whose softplus is log-uniform between two step sizes (mamba-ssm's initialisation)."""
    if not 0 < lowest <= highest:
        raise ConfigurationError(f"expected 0 < dt_min <= dt_max, found {lowest} and {highest}")
    low, high = math.log(lowest), math.log(highest)
    dt = torch.exp(torch.rand(width) * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus


def _no_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that weight decay must leave alone, as mamba-ssm does."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def _check_input(x: Tensor, width: int, mask: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[2] != width or x.shape[1] == 0:
        raise DataError(f"expected x of shape (B, T >= 1, {width}), found {tuple(x.shape)}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise DataError(
            f"mask: expected bool of shape {tuple(x.shape[:2])}, True where valid, "
            f"found {mask.dtype} of shape {tuple(mask.shape)}"
        )


def _project(projection: nn.Linear, x: Tensor, mask: Tensor | None) -> Tensor:
    """The input projection, exactly zero at padded steps whatever the padding holds."""
    if mask is None:
        return projection(x)
    silent = ~mask.unsqueeze(2)
    y = projection(x.masked_fill(silent, 0))
    return y if projection.bias is None else y.masked_fill(silent, 0)


def _heads(width: int, headdim: int, ngroups: int) -> int:
    if width % headdim or (width // headdim) % ngroups:
        raise ConfigurationError(
            f"expected headdim to divide the inner width and ngroups the heads, "
            f"found width {width}, headdim {headdim}, ngroups {ngroups}"
        )
    return width // headdim


class Mamba(nn.Module):
    """Mamba-1: the selective scan S6 (Gu and Dao 2023, section 3.4, figure 3).

    Args:
        d_model: channels C.
        d_state: N, numbers remembered per inner channel.
        d_conv: taps of the causal convolution.
        expand: inner width / C.
        dt_rank: width of the bottleneck that produces the step sizes; "auto" is ceil(C / 16).
        bias, conv_bias: biases of the projections and of the convolution.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes.
        leak_padding: let padding into the state, as the published code does (see the module).
        backend: see `tvg_lib.ssm.Backend`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        bias: bool = False,
        conv_bias: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        leak_padding: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        width = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.sizes = (rank, d_state, d_state)
        self.leak_padding = leak_padding
        self.backend: Backend = backend
        self.in_proj = nn.Linear(d_model, 2 * width, bias=bias)
        self.conv1d = DepthwiseConv(width, d_conv, conv_bias, causal=True)
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, width)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_step_bias(width, dt_min, dt_max, dt_init_floor))
        spectrum = torch.arange(1, d_state + 1, dtype=torch.float32)  # S4D-real
        self.A_log = _no_decay(nn.Parameter(spectrum.log().repeat(width, 1)))
        self.D = _no_decay(nn.Parameter(torch.ones(width)))
        self.out_proj = nn.Linear(width, d_model, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` (B, T) is True where valid."""
        return self.forward_with_state(x, mask)[0]

    def forward_with_state(
        self, x: Tensor, mask: Tensor | None = None, state: MambaState | None = None
    ) -> tuple[Tensor, MambaState]:
        """As `forward`, starting from `state` and also returning the state after the last step.

        Running a sequence in pieces gives the same as running it whole.

        Raises:
            DataError: shapes do not fit.
        """
        _check_input(x, self.in_proj.in_features, mask)
        inner, z = _project(self.in_proj, x, mask).chunk(2, 2)
        scan_mask = None if self.leak_padding else mask
        history = None if state is None else state.conv
        u = self.conv1d(inner, history, self.backend)
        low, B, C = self.x_proj(u).split(self.sizes, 2)
        y, h = s6_scan(
            u,
            F.linear(low, self.dt_proj.weight),
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            mask=scan_mask,
            initial_state=None if state is None else state.scan,
            backend=self.backend,
        )
        y = self.out_proj(y)
        if scan_mask is not None and self.out_proj.bias is not None:
            y = y * scan_mask.unsqueeze(2)
        return y, MambaState(self.conv1d.tail(inner, history, scan_mask), h)


class _DualityLayer(nn.Module):
    """What Mamba2 and Hydra share: all but the norm, the output projection and the forward pass.

    Args:
        d_model: channels C.
        d_state: N, numbers remembered per inner channel and direction.
        d_conv: taps of the convolution.
        expand: inner width / C.
        headdim: P, channels of a head.
        ngroups: heads are divided into so many groups that share B and C.
        directions: 1 or 2; each has its own B, C and step sizes.
        bias, conv_bias: biases of the projections and of the convolution.
        chunk_size: see `ssd_scan`.
        dt_min, dt_max, dt_init_floor, A_init_range: ranges of the initial step sizes and of -A.
        leak_padding: let padding into the state, as the published code does (see the module).
        backend: see `tvg_lib.ssm.Backend`.
    """

    norm: GatedRMSNorm
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        d_state: int,
        d_conv: int,
        expand: float,
        headdim: int,
        ngroups: int,
        directions: int,
        *,
        bias: bool,
        conv_bias: bool,
        chunk_size: int | None,
        dt_min: float,
        dt_max: float,
        dt_init_floor: float,
        A_init_range: tuple[float, float],
        leak_padding: bool,
        backend: Backend,
    ) -> None:
        super().__init__()
        width = int(expand * d_model)
        self.width = width
        self.nheads = _heads(width, headdim, ngroups)
        self.ngroups = ngroups
        of_state = directions * ngroups * d_state
        self.sizes = (width, of_state, of_state)
        self.chunk_size = chunk_size
        self.leak_padding = leak_padding
        self.backend: Backend = backend
        inner = sum(self.sizes)
        self.parts = (width, inner, directions * self.nheads)
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=bias)
        self.conv1d = DepthwiseConv(inner, d_conv, conv_bias, causal=directions == 1)
        self.dt_bias = _no_decay(
            nn.Parameter(_step_bias(self.nheads, dt_min, dt_max, dt_init_floor))
        )
        A = torch.empty(self.nheads).uniform_(*A_init_range)
        self.A_log = _no_decay(nn.Parameter(A.log()))
        self.D = _no_decay(nn.Parameter(torch.ones(self.nheads)))

    def _enter(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """The input projection: gate, input of the convolution, raw step sizes."""
        _check_input(x, self.in_proj.in_features, mask)
        return _project(self.in_proj, x, mask).split(self.parts, 2)

    def _scan(
        self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One direction, on u (B, T, H, P) and B, C (B, T, G * N)."""
        return ssd_scan(
            u,
            dt,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.unflatten(2, (self.ngroups, -1)),
            C.unflatten(2, (self.ngroups, -1)),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            chunk_size=self.chunk_size,
            backend=self.backend,
            **options,
        )

    def _leave(self, y: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        """Norm, gate and output projection of y (B, T, H, P); padded steps stay zero."""
        y = self.out_proj(self.norm(y.flatten(2), z, self.backend))
        return y if mask is None else y * mask.unsqueeze(2)


class Mamba2(_DualityLayer):
    """Mamba-2: state-space duality SSD (Dao and Gu 2024, section 7, figure 6).

    Args:
        d_model: channels C.
        d_state: N, numbers remembered per inner channel.
        d_conv: taps of the causal convolution.
        expand: inner width / C.
        headdim: P, channels of a head.
        ngroups: heads are divided into so many groups that share B and C.
        bias, conv_bias: biases of the projections and of the convolution.
        norm_before_gate: see `GatedRMSNorm`.
        chunk_size: see `ssd_scan`.
        dt_min, dt_max, dt_init_floor, A_init_range: ranges of the initial step sizes and of -A.
        leak_padding: let padding into the state, as the published code does (see the module).
        backend: see `tvg_lib.ssm.Backend`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        norm_before_gate: bool = False,
        chunk_size: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_init_range: tuple[float, float] = (1, 16),
        leak_padding: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            headdim,
            ngroups,
            directions=1,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            A_init_range=A_init_range,
            leak_padding=leak_padding,
            backend=backend,
        )
        self.norm = GatedRMSNorm(self.width, norm_before_gate, ngroups)
        self.out_proj = nn.Linear(self.width, d_model, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` (B, T) is True where valid."""
        return self.forward_with_state(x, mask)[0]

    def forward_with_state(
        self, x: Tensor, mask: Tensor | None = None, state: MambaState | None = None
    ) -> tuple[Tensor, MambaState]:
        """As `forward`, starting from `state` and also returning the state after the last step.

        Running a sequence in pieces gives the same as running it whole.

        Raises:
            DataError: shapes do not fit.
        """
        z, inner, dt = self._enter(x, mask)
        mask = None if self.leak_padding else mask
        history = None if state is None else state.conv
        u, B, C = self.conv1d(inner, history, self.backend).split(self.sizes, 2)
        y, h = self._scan(
            u.unflatten(2, (self.nheads, -1)),
            dt,
            B,
            C,
            D=self.D,
            mask=mask,
            initial_state=None if state is None else state.scan,
        )
        return self._leave(y, z, mask), MambaState(self.conv1d.tail(inner, history, mask), h)


class Hydra(_DualityLayer):
    """Hydra: bidirectional, by a quasiseparable matrix mixer (Hwang et al. 2024, section 3).

    y = shift(SSD(x)) + flip(shift(SSD(flip(x)))) + diag(D + fc_D x) x: each pass is shifted by one
    step, so a step hears only the others from it; the step itself enters through the diagonal. The
    two passes have their own B, C and step sizes and share A.

    Args:
        d_model: channels C.
        d_state: N, numbers remembered per inner channel and direction.
        d_conv: taps of the symmetric convolution, odd.
        expand: inner width / C.
        headdim: P, channels of a head.
        ngroups: heads are divided into so many groups that share B and C.
        bias, conv_bias: biases of the projections and of the convolution.
        chunk_size: see `ssd_scan`.
        dt_min, dt_max, dt_init_floor, A_init_range: ranges of the initial step sizes and of -A.
        leak_padding: let padding into the state, as the published code does (see the module).
        backend: see `tvg_lib.ssm.Backend`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_init_range: tuple[float, float] = (1, 16),
        leak_padding: bool = False,
        backend: Backend = "auto",
    ) -> None:
        if d_conv % 2 == 0:
            raise ConfigurationError(f"Hydra: d_conv: expected an odd number, found {d_conv}")
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            headdim,
            ngroups,
            directions=2,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            A_init_range=A_init_range,
            leak_padding=leak_padding,
            backend=backend,
        )
        self.fc_D = nn.Linear(self.width, self.nheads, bias=False)
        self.norm = GatedRMSNorm(self.width, norm_before_gate=True)
        self.out_proj = nn.Linear(self.width, d_model, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` (B, T) is True where valid.

        Raises:
            DataError: shapes do not fit.
        """
        z, inner, dt = self._enter(x, mask)
        mask = None if self.leak_padding else mask
        # channels after the convolution: x, then B and C of the forward pass, then of the backward
        u, forward, backward = self.conv1d(inner, None, self.backend).split(self.sizes, 2)
        diagonal = F.linear(u, self.fc_D.weight, self.D)  # (B, T, H)
        u = u.unflatten(2, (self.nheads, -1))
        dt_forward, dt_backward = dt.chunk(2, 2)
        past, _ = self._scan(u, dt_forward, *forward.chunk(2, 2), mask=mask)
        future, _ = self._scan(u, dt_backward, *backward.chunk(2, 2), mask=mask, reverse=True)
        return self._leave(_Quasiseparable.apply(u, diagonal, past, future), z, mask)


class _Quasiseparable(torch.autograd.Function):
    """y_t = diagonal_t u_t + past_{t-1} + future_{t+1}, on (B, T, H, P); zeros beyond the ends.

    By hand because it touches each number once; slices and additions would write (B, T, H, P) four
    times more in each direction.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, diagonal: Tensor, past: Tensor, future: Tensor) -> Tensor:
        ctx.save_for_backward(u, diagonal)
        y = u * diagonal.to(u.dtype).unsqueeze(3)
        y[:, 1:] += past[:, :-1]
        y[:, :-1] += future[:, 1:]
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        u, diagonal = ctx.saved_tensors
        return (
            dy * diagonal.to(u.dtype).unsqueeze(3),
            (dy * u).sum(3).to(diagonal.dtype),
            F.pad(dy[:, 1:], (0, 0, 0, 0, 0, 1)),
            F.pad(dy[:, :-1], (0, 0, 0, 0, 1, 0)),
        )
