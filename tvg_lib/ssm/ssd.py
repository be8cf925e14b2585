"""SSD, the scan of Mamba-2 (Dao and Gu 2024, sections 3, 6 and 7).

    paper            here               meaning
    X_t              x    (B, T, H, P)  input, H heads of P channels
    Delta_t          dt   (B, T, H)     step size; softplus(dt + dt_bias) when `dt_softplus`
    A                A    (H,)          one negative number per head
    B_t, C_t         B, C (B, T, G, N)  written to and read from the state; H / G heads share each
    h_t              state (B, H, P, N) the state
    D                D    (H,) or (H, P) skip connection

    h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T        y_t = h_t C_t + D x_t

One number per head decays the whole state, so a chunk of Q steps is a masked attention (duality):

    y_i = sum_{j <= i} (C_i . B_j) exp(a_i - a_j) Delta_j x_j  +  exp(a_i) h_start C_i,
    a_i = sum_{k <= i} Delta_k A    within the chunk

and chunks only hand their state on. Work and memory are linear in T: the state is carried from
chunk to chunk, where the paper's listing 1 forms a (chunks x chunks) matrix.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tvg_lib.errors import DataError
from tvg_lib.ssm import kernels
from tvg_lib.ssm.kernels import Backend
from tvg_lib.ssm.s6 import check_shapes, silence

_LOG2E = math.log2(math.e)
_CPU_BLOCK = 1 << 18  # entries of the (Q x Q) matrices held at once
_GPU_BLOCK = 1 << 27


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one line per equation. `dt` is the final, positive step size.

    Returns:
        y (B, T, H, P) and the state after the last step (B, H, P, N).
    """
    batch, steps, heads, channels = x.shape
    share = heads // B.shape[2]
    h = x.new_zeros(batch, heads, channels, B.shape[3]) if state is None else state
    outputs = []
    for t in range(steps):
        B_t = B[:, t].repeat_interleave(share, 1)  # (B, H, N)
        C_t = C[:, t].repeat_interleave(share, 1)
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        h_next = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B_t[:, :, None, :]
        y = (h_next * C_t[:, :, None, :]).sum(-1)
        if mask is None:
            h = h_next
        else:
            h = torch.where(mask[:, t, None, None, None], h_next, h)
            y = torch.where(mask[:, t, None, None], y, 0)
        outputs.append(y)
    return torch.stack(outputs, 1), h


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """State-space duality over (B, T, H, P), linear in T in time and memory.

    Args:
        x, dt, A, B, C, D: see the module's glossary.
        dt_bias: (H,), added to `dt` before the softplus.
        dt_softplus: pass `dt + dt_bias` through softplus.
        mask: (B, T), True where valid. Other steps leave the state as it is and give zero.
        initial_state: (B, H, P, N), state before the first step; zeros if None.
        chunk_size: steps that attend to one another directly. None: 64 in PyTorch (the fastest of
            32, 64, 128, 256 on two CPU cores), 256 in the kernel. It never changes the result
            beyond rounding.
        backend: see `tvg_lib.ssm.Backend`.

    Returns:
        y (B, T, H, P) in the type of `x`, and the state after the last step (B, H, P, N), float32
        (float64 for float64 input).

    Raises:
        DataError: shapes do not fit one another.
        ConfigurationError: the backend asked for cannot be used.
    """
    _check(x, dt, A, B, C, D, dt_bias, mask, initial_state, chunk_size)
    if kernels.wanted(backend, kernels.chunk_scan, x):
        size = 256 if chunk_size is None else chunk_size
        return _kernel(x, dt, A, B, C, D, dt_bias, dt_softplus, mask, initial_state, size)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(accumulate)
    step = step if dt_bias is None else step + dt_bias.to(accumulate)
    step = F.softplus(step) if dt_softplus else step
    A = A.to(accumulate)
    if backend == "reference":
        xf = x.to(accumulate)
        y, state = ssd_reference(
            xf, step, A, B.to(accumulate), C.to(accumulate), initial_state, mask
        )
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]).to(accumulate) * xf
        y = y.to(x.dtype)
    else:
        if mask is not None:  # a step of size zero neither writes to the state nor lets it decay
            step = step * mask[:, :, None]
        q = 64 if chunk_size is None else chunk_size
        y, state = _by_group(x, step, A, B, C, D, initial_state, q)
    return (y if mask is None else y * mask[:, :, None, None]), state


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    chunk_size: int | None,
) -> None:
    if x.dim() != 4 or B.dim() != 4 or x.shape[1] == 0:
        raise DataError(
            "ssd: expected x of shape (B, T >= 1, H, P) and B of shape (B, T, G, N), "
            f"found {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, steps, heads, channels = x.shape
    groups, n = B.shape[2:]
    if heads % groups:
        raise DataError(f"ssd: expected groups that divide {heads} heads, found {groups}")
    if chunk_size is not None and chunk_size < 1:
        raise DataError(f"ssd: chunk_size: expected at least 1, found {chunk_size}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (batch, steps, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, steps, groups, n)),
        "C": (C, (batch, steps, groups, n)),
        "D": (D, (heads, channels) if D is not None and D.dim() == 2 else (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "mask": (mask, (batch, steps)),
        "initial_state": (state, (batch, heads, channels, n)),
    }
    check_shapes("ssd", expected, mask)


def _kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    mask: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's Triton kernels."""
    if mask is not None:
        dt = silence(dt, mask, dt_softplus, dt_bias)
    call = kernels.chunk_scan().call
    assert call is not None
    y, final = call(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        dt_bias=dt_bias,
        initial_states=state,
        dt_softplus=dt_softplus,
        return_final_states=True,
    )
    return (y if mask is None else y.masked_fill(~mask[:, :, None, None], 0)), final


def _by_group(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    q: int,
) -> tuple[Tensor, Tensor]:
    """Run the chunked scan once per group of heads that share B and C (nearly always one)."""
    groups = B.shape[2]
    share = x.shape[2] // groups
    parts = []
    for g in range(groups):
        h = slice(g * share, (g + 1) * share)
        parts.append(
            _SSD.apply(
                x[:, :, h],
                dt[:, :, h],
                A[h],
                B[:, :, g],
                C[:, :, g],
                None if D is None else D[h],
                None if state is None else state[:, h],
                q,
            )
        )
    if groups == 1:
        return parts[0]
    return torch.cat([y for y, _ in parts], 2), torch.cat([s for _, s in parts], 1)


class _SSD(torch.autograd.Function):
    """The chunked scan for one group: B and C are (B, T, N), `dt` is final.

    Everything that involves the state is one large matrix product over all heads, in the layout the
    inputs already have: states are (N, H * P), chunks (Q, H * P). Only the (Q x Q) attention needs
    heads apart. Chunks are taken a block at a time, so the (Q x Q) matrices stay in the cache and
    are never stored; the backward pass forms them again. Kept for it: the inputs and the state at
    the start of each chunk (as many numbers as `x` when Q = N).

    Rounding: a_i - a_j is a difference of sums over at most Q steps. Its error is at most about
    Q * eps * (mean step) and enters multiplied by exp(a_i - a_j), so it stays below 3e-6 for Q = 64
    however fast the state decays.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor | None,
        q: int,
    ) -> tuple[Tensor, Tensor]:
        batch, _, heads, channels = x.shape
        n = B.shape[2]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        h = dt.new_zeros(batch, n, heads * channels)
        if state is not None:
            h.copy_(state.permute(0, 3, 1, 2).reshape(h.shape))
        keep = any(ctx.needs_input_grad)
        kept = []
        with torch.autocast(x.device.type, enabled=False):
            for time, q_now in _blocks(x, q):
                block = _Chunks(x, dt, A, B, C, time, q_now)
                starts, h = block.pass_states(h)
                if keep:
                    kept.append(starts)
                out = block.from_states(starts)
                _, attention = block.attention(in_place=True)
                seen = attention @ _heads_first(block.x, block.dt)
                if D is not None:
                    out.addcmul_(block.x, _per_channel(D))
                torch.add(out, _split(seen), out=out)
                y[:, time] = out.view(batch, -1, heads, channels)
        ctx.save_for_backward(x, dt, A, B, C, D, *kept)
        ctx.q = q
        ctx.has_state = state is not None
        return y, h.view(batch, n, heads, channels).permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, *kept = ctx.saved_tensors
        batch, _, heads, channels = x.shape
        n = B.shape[2]
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dA = torch.zeros_like(A)
        dD = dA.new_zeros(heads, channels)
        g = dstate.permute(0, 3, 1, 2).reshape(batch, n, -1).to(dt.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for (time, q), starts in zip(
                reversed(list(_blocks(x, ctx.q))), kept[::-1], strict=True
            ):
                block = _Chunks(x, dt, A, B, C, time, q)
                out = _chunked(dy, time, q, dt.dtype)
                # through the state: y_i = exp(a_i) C_i h_start
                scaled = (out * block.from_start).flatten(3)
                through = block.C.transpose(2, 3) @ scaled  # gradient of h_start, (b, c, N, HP)
                ends, g = block.pass_gradients(through, g)  # gradient of each chunk's last state
                dC_block = scaled @ starts.transpose(2, 3)
                da = block.from_states(starts).mul_(out).sum(4)
                # through the write: h_end = exp(a_Q) h_start + sum_j exp(a_Q - a_j) xd_j B_j
                dB_block = block.xw.flatten(3) @ ends.transpose(2, 3)
                dxd = (block.B @ ends).view(out.shape).mul_(block.to_end)
                write = (dxd * block.x).sum(4).mul_(block.dt)
                da_end = (ends * starts).sum(2).view(batch, -1, heads, channels).sum(3)
                da_end = da_end * block.decay + write.sum(2)
                da -= write
                # within the chunk: y_i = sum_j M_ij xd_j, M = G o L, G = C B^T
                decays, attention = block.attention()
                out_h, xd_h = _heads_first(out), _heads_first(block.x, block.dt)
                dxd += _split(attention.transpose(3, 4) @ out_h)
                weighted = torch.matmul(out_h, xd_h.transpose(3, 4)).mul_(decays)  # dM o L
                dG = weighted.sum(2).tril_()
                dC_block += dG @ block.B
                dB_block += dG.transpose(2, 3) @ block.C
                # dM o M below the diagonal: a_i - a_j is zero on it
                weighted.mul_(block.scores().tril_(-1).unsqueeze(2))
                da += (weighted.sum(4) - weighted.sum(3)).transpose(2, 3)
                da[:, :, -1] += da_end
                # a is a running sum within the chunk, so its gradient is one from the end
                dstep = da.flip(2).cumsum(2).flip(2)
                dA += (dstep * block.dt).sum((0, 1, 2))
                dstep = dstep * A + (dxd * block.x).sum(4)
                dxd.mul_(block.dt.unsqueeze(4))
                if D is not None:
                    dD += (out * block.x).sum((0, 1, 2))
                    dxd.addcmul_(out, _per_channel(D))
                dx[:, time] = dxd.view(batch, -1, heads, channels)
                ddt[:, time] = dstep.view(batch, -1, heads)
                dB[:, time] = dB_block.flatten(1, 2)
                dC[:, time] = dC_block.flatten(1, 2)
        if D is not None:
            dD = (dD if D.dim() == 2 else dD.sum(1)).to(D.dtype)
        return (
            dx,
            ddt,
            dA,
            dB,
            dC,
            None if D is None else dD,
            g.view(batch, n, heads, channels).permute(0, 2, 3, 1) if ctx.has_state else None,
            None,
        )


def _blocks(x: Tensor, q: int) -> Iterator[tuple[slice, int]]:
    """Time ranges of whole chunks, as many as fit the budget, then the shorter last chunk."""
    batch, length, heads, _ = x.shape
    room = _GPU_BLOCK if x.is_cuda else _CPU_BLOCK
    size = q * max(1, room // (batch * heads * q * q))
    whole = length // q * q
    for t in range(0, whole, size):
        yield slice(t, min(t + size, whole)), q
    if whole < length:
        yield slice(whole, length), length - whole


def _chunked(v: Tensor, time: slice, q: int, dtype: torch.dtype) -> Tensor:
    """(B, T, ...) -> (B, chunks, Q, ...) for one time range."""
    return v[:, time].to(dtype).unflatten(1, (-1, q))


def _heads_first(v: Tensor, factor: Tensor | None = None) -> Tensor:
    """(B, c, Q, H, P) -> (B, c, H, Q, P), contiguous for the batched product.

    `factor` (B, c, Q, H) multiplies on the way.
    """
    turned = v.transpose(2, 3)
    if factor is None:
        return turned.contiguous()
    place = torch.empty(turned.shape, dtype=v.dtype, device=v.device)
    return torch.mul(turned, factor.transpose(2, 3).unsqueeze(4), out=place)


def _split(v: Tensor) -> Tensor:
    """(B, c, H, Q, P) -> (B, c, Q, H, P), a view."""
    return v.transpose(2, 3)


def _per_channel(D: Tensor) -> Tensor:
    return D if D.dim() == 2 else D[:, None]


class _Chunks:
    """One block of chunks (B, c, Q, ...) with its decays, in the accumulation type."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, time: slice, q: int
    ) -> None:
        kind = dt.dtype
        self.x = _chunked(x, time, q, kind)  # (B, c, Q, H, P)
        self.dt = _chunked(dt, time, q, kind)  # (B, c, Q, H)
        self.B = _chunked(B, time, q, kind)  # (B, c, Q, N)
        self.C = _chunked(C, time, q, kind)
        a = (self.dt * (A * _LOG2E)).cumsum(2)  # a_i in powers of two: exp2 is the faster one
        self.a = a.transpose(2, 3).contiguous()  # (B, c, H, Q)
        self.decay = torch.exp2(a[:, :, -1])  # (B, c, H), over the whole chunk
        self.from_start = torch.exp2(a).unsqueeze(4)  # (B, c, Q, H, 1)
        self.to_end = torch.exp2(a[:, :, -1:] - a).unsqueeze(4)
        self.xw = self.x * (self.to_end * self.dt.unsqueeze(4))

    def pass_states(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """States at the start of each chunk (B, c, N, HP), and the state after the last."""
        local = self.B.transpose(2, 3) @ self.xw.flatten(3)
        decay = self._decay_rows()
        starts = torch.empty_like(local)
        starts[:, 0] = h
        for i in range(1, local.shape[1]):
            torch.addcmul(local[:, i - 1], starts[:, i - 1], decay[:, i - 1], out=starts[:, i])
        return starts, torch.addcmul(local[:, -1], starts[:, -1], decay[:, -1])

    def pass_gradients(self, through: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states at the end of each chunk, and of the state before the first."""
        decay = self._decay_rows()
        ends = torch.empty_like(through)
        ends[:, -1] = g
        for i in reversed(range(1, through.shape[1])):
            torch.addcmul(through[:, i], ends[:, i], decay[:, i], out=ends[:, i - 1])
        return ends, torch.addcmul(through[:, 0], ends[:, 0], decay[:, 0])

    def _decay_rows(self) -> Tensor:
        return self.decay.repeat_interleave(self.x.shape[4], 2).unsqueeze(2)  # (B, c, 1, HP)

    def from_states(self, starts: Tensor) -> Tensor:
        """What the chunk's start state adds to each step: (B, c, Q, H, P)."""
        return (self.C @ starts).view(self.x.shape).mul_(self.from_start)

    def attention(self, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """L (B, c, H, Q, Q), valid in the lower triangle, and M = G o L.

        Above the diagonal a_i - a_j would be positive and could overflow: it is cut to zero, and G
        is zero there. `in_place`: M takes the place of L.
        """
        decays = self.a.unsqueeze(4) - self.a.unsqueeze(3)
        decays.clamp_(max=0).exp2_()
        scores = self.scores().unsqueeze(2)
        return decays, decays.mul_(scores) if in_place else decays * scores

    def scores(self) -> Tensor:
        """G = C B^T (B, c, Q, Q), lower triangle."""
        return (self.C @ self.B.transpose(2, 3)).tril_()
