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
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tvg_lib.errors import DataError
from tvg_lib.ssm import kernels
from tvg_lib.ssm.kernels import Backend
from tvg_lib.ssm.s6 import check_shapes, silence

_LOG2E = math.log2(math.e)
_CHUNK = 64
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


class _Inputs(NamedTuple):
    """What a scan is computed from, or its gradients; shapes in the module's glossary."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    dt_bias: Tensor | None = None
    mask: Tensor | None = None
    initial_state: Tensor | None = None


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
    reverse: bool = False,
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
        reverse: run from the last step to the first, as if all inputs were flipped along time and
            the output flipped back (nothing is flipped in PyTorch).
        chunk_size: steps that attend to one another directly. None: 64 in PyTorch (the fastest of
            32, 64, 128, 256 on two CPU cores), 256 in the kernel. It never changes the result
            beyond rounding.
        backend: see `tvg_lib.ssm.Backend`.

    Returns:
        y (B, T, H, P) in the type of `x`, and the state after the run's last step (B, H, P, N),
        float32 (float64 for float64 input).

    Raises:
        DataError: shapes do not fit one another.
        ConfigurationError: the backend asked for cannot be used.
    """
    inputs = _Inputs(x, dt, A, B, C, D, dt_bias, mask, initial_state)
    _check(inputs, chunk_size)
    if kernels.wanted(backend, kernels.chunk_scan, x):
        call = partial(_kernel, dt_softplus=dt_softplus, chunk_size=chunk_size or 256)
        return _turned(call, inputs) if reverse else call(inputs)
    kind = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(kind)
    step = step if dt_bias is None else step + dt_bias.to(kind)
    step = F.softplus(step) if dt_softplus else step
    inputs = inputs._replace(dt=step, A=A.to(kind), dt_bias=None)
    if backend == "reference":
        return _turned(_recurrence, inputs) if reverse else _recurrence(inputs)
    q = chunk_size or _CHUNK
    if mask is not None:  # a step of size zero neither writes to the state nor lets it decay
        inputs = inputs._replace(dt=step * mask[:, :, None], mask=None)
        if D is None:  # silencing what reads costs less than silencing what was read
            return _by_group(inputs._replace(C=C * mask[:, :, None, None]), q, reverse)
    y, state = _by_group(inputs, q, reverse)
    return (y if mask is None else y * mask[:, :, None, None]), state


def _check(inputs: _Inputs, chunk_size: int | None) -> None:
    x, B, D = inputs.x, inputs.B, inputs.D
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
    expected = {
        "dt": (batch, steps, heads),
        "A": (heads,),
        "B": (batch, steps, groups, n),
        "C": (batch, steps, groups, n),
        "D": (heads, channels) if D is not None and D.dim() == 2 else (heads,),
        "dt_bias": (heads,),
        "mask": (batch, steps),
        "initial_state": (batch, heads, channels, n),
    }
    check_shapes("ssd", inputs._asdict(), expected)


def _turned(
    call: Callable[[_Inputs], tuple[Tensor, Tensor]], inputs: _Inputs
) -> tuple[Tensor, Tensor]:
    """`call` on everything flipped along time, its output flipped back."""
    along_time = {name: getattr(inputs, name) for name in ("x", "dt", "B", "C", "mask")}
    flipped = {name: v if v is None else v.flip(1) for name, v in along_time.items()}
    y, state = call(inputs._replace(**flipped))
    return y.flip(1), state


def _recurrence(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """`ssd_reference` with the skip connection, in the accumulation type."""
    x, dt, A, B, C, D, _, mask, state = inputs
    xf = x.to(dt.dtype)
    y, state = ssd_reference(xf, dt, A, B.to(dt.dtype), C.to(dt.dtype), state, mask)
    if D is not None:
        y = y + _per_channel(D).to(dt.dtype) * xf
    return (y if mask is None else y * mask[:, :, None, None]).to(x.dtype), state


def _kernel(inputs: _Inputs, dt_softplus: bool, chunk_size: int) -> tuple[Tensor, Tensor]:
    """mamba-ssm's Triton kernels."""
    x, dt, A, B, C, D, dt_bias, mask, state = inputs
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


def _by_group(inputs: _Inputs, q: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """Run the chunked scan once per group of heads that share B and C (nearly always one)."""
    x, dt, A, B, C, D, _, _, state = inputs
    groups = B.shape[2]
    share = x.shape[2] // groups
    parts = []
    for g in range(groups):
        h = slice(g * share, (g + 1) * share)
        group = _Inputs(
            x[:, :, h],
            dt[:, :, h],
            A[h],
            B[:, :, g],
            C[:, :, g],
            None if D is None else D[h],
            initial_state=None if state is None else state[:, h],
        )
        parts.append(_SSD.apply(q, reverse, *group))
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
    def forward(ctx: Any, q: int, reverse: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(*tensors)  # type: ignore[arg-type]
        x, state = inputs.x, inputs.initial_state
        batch, _, heads, channels = x.shape
        n = inputs.B.shape[2]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        h = inputs.dt.new_zeros(batch, n, heads * channels)
        if state is not None:
            h.copy_(state.permute(0, 3, 1, 2).reshape(h.shape))
        kept = []
        with torch.autocast(x.device.type, enabled=False):
            for part in _parts(inputs, q, reverse):
                for block in part.blocks():
                    starts, h = block.pass_states(h)
                    kept.append(starts)
                    out = torch.bmm(block.C, starts).view(block.shape).mul_(block.from_start)
                    decays, scores = block.decays(), block.scores()
                    attention = block.by_head(decays).mul_(scores.unsqueeze(1)).flatten(0, 1)
                    seen = torch.bmm(attention, block.heads_first(block.x, block.dt))
                    if inputs.D is not None:
                        out.addcmul_(block.x, _per_channel(inputs.D))
                    torch.add(
                        block.by_sequence(out),
                        block.by_sequence(block.heads_last(seen)),
                        out=block.of(y),
                    )
        ctx.save_for_backward(*tensors, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.q, ctx.reverse = q, reverse
        return y, h.view(batch, n, heads, channels).permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        count = len(_Inputs._fields)
        inputs, kept = _Inputs(*ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        x, dt, A, B, C, D = inputs[:6]
        batch, _, heads, channels = x.shape
        n = B.shape[2]
        dx, ddt, da = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(dt)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dA = torch.zeros_like(A)
        dD = dA.new_zeros(heads, channels)
        g = dstate.permute(0, 3, 1, 2).reshape(batch, n, -1).to(dt.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for part in reversed(_parts(inputs, ctx.q, ctx.reverse)):
                for block in part.blocks(backwards=True):
                    starts = kept.pop()
                    out = block.load(dy)
                    # through the state: y_i = exp(a_i) C_i h_start
                    scaled = out * block.from_start
                    rows = scaled.flatten(2)
                    ends, g = block.pass_gradients(torch.bmm(block.C.mT, rows), g)
                    dC_block = torch.bmm(rows, starts.mT)
                    da_block = scaled.mul_(torch.bmm(block.C, starts).view(block.shape)).sum(3)
                    # through the write: h_end = exp(a_Q) h_start + sum_j exp(a_Q - a_j) xd_j B_j
                    dxd = torch.bmm(block.B, ends).view(block.shape)
                    dB_block = torch.bmm(block.xw.flatten(2), ends.mT)
                    write = block.xw.mul_(dxd).sum(3)
                    dxd.mul_(block.to_end)
                    da_block -= write
                    da_end = ends.mul_(starts).sum(1).view(-1, heads, channels).sum(2)
                    da_end.mul_(block.decay.flatten(0, 1)).add_(write.sum(1))
                    da_block[:, block.last] += da_end
                    # within the chunk: y_i = sum_j M_ij xd_j, M = G o L, G = C B^T
                    decays, scores = block.decays(), block.scores()
                    attention = (block.by_head(decays) * scores.unsqueeze(1)).flatten(0, 1)
                    out_h, xd_h = block.heads_first(out), block.heads_first(block.x, block.dt)
                    dxd += block.heads_last(torch.bmm(attention.mT, out_h))
                    weighted = torch.bmm(out_h, xd_h.mT, out=attention).mul_(decays)  # dM o L
                    weighted = block.by_head(weighted)
                    dG = block.cut(weighted.sum(1))
                    dC_block.baddbmm_(dG, block.B)
                    dB_block.baddbmm_(dG.mT, block.C)
                    # dM o M off the diagonal: a_i - a_j is zero on it
                    weighted.mul_(block.cut(scores, 1).unsqueeze(1))
                    da_block += (weighted.sum(3) - weighted.sum(2)).transpose(1, 2)
                    block.of(da).copy_(block.by_sequence(da_block))
                    torch.sum(block.by_sequence(dxd * block.x), 4, out=block.of(ddt))
                    dxd.mul_(block.dt)
                    if D is not None:
                        dD += (out * block.x).sum((0, 1))
                        dxd.addcmul_(out, _per_channel(D))
                    block.of(dx).copy_(block.by_sequence(dxd))
                    block.of(dB).copy_(block.by_sequence(dB_block))
                    block.of(dC).copy_(block.by_sequence(dC_block))
                # a is a running sum within the chunk, so its gradient is one from the other end
                dstep = part.running_sum(part.chunked(da), not ctx.reverse)
                dA += (dstep * part.dt).sum((0, 1, 2))
                part.chunked(ddt).addcmul_(dstep, A)
        if D is not None:
            dD = (dD if D.dim() == 2 else dD.sum(1)).to(D.dtype)
        dinitial = g.view(batch, n, heads, channels).permute(0, 2, 3, 1)
        return (
            None,
            None,
            *_Inputs(
                dx,
                ddt,
                dA,
                dB,
                dC,
                None if D is None else dD,
                initial_state=None if inputs.initial_state is None else dinitial,
            ),
        )


def _per_channel(D: Tensor) -> Tensor:
    return D if D.dim() == 2 else D[:, None]


def _parts(inputs: _Inputs, q: int, reverse: bool) -> list["_Chunks"]:
    """The whole chunks, and the shorter one that is left, in the order of the run."""
    length = inputs.x.shape[1]
    whole = length // q * q
    cuts = [(0, whole, q), (whole, length, length - whole)]
    parts = [_Chunks(inputs, slice(a, b), size, reverse) for a, b, size in cuts if a < b]
    return parts[::-1] if reverse else parts


class _Chunks:
    """Consecutive chunks of one length: their decays, and how they are cut into blocks."""

    def __init__(self, inputs: _Inputs, time: slice, q: int, reverse: bool) -> None:
        self.inputs, self.time, self.q, self.reverse = inputs, time, q, reverse
        self.dt = self.chunked(inputs.dt)  # (B, c, Q, H)
        # a_i in powers of two: exp2 is faster than exp
        a = self.running_sum(self.dt * (inputs.A * _LOG2E), reverse)
        end = a[:, :, :1] if reverse else a[:, :, -1:]
        self.a = a.transpose(2, 3).contiguous()  # (B, c, H, Q)
        self.from_start = torch.exp2(a)
        self.to_end = torch.exp2(end - a)
        self.decay = torch.exp2(end[:, :, 0])  # (B, c, H), over the whole chunk
        self.write = self.to_end * self.dt

    def chunked(self, v: Tensor) -> Tensor:
        """(B, T, ...) -> (B, c, Q, ...), a view."""
        return v[:, self.time].unflatten(1, (-1, self.q))

    @staticmethod
    def running_sum(v: Tensor, from_the_end: bool) -> Tensor:
        """Sum over the steps of each chunk (dimension 2) up to each step."""
        return v.flip(2).cumsum(2).flip(2) if from_the_end else v.cumsum(2)

    def blocks(self, backwards: bool = False) -> Iterator["_Block"]:
        """As many chunks at a time as fit the budget, in the order of the run or against it."""
        batch, count, _, heads = self.dt.shape
        room = _GPU_BLOCK if self.dt.is_cuda else _CPU_BLOCK
        size = max(1, room // (batch * heads * self.q * self.q))
        cuts = [slice(i, min(i + size, count)) for i in range(0, count, size)]
        for cut in cuts if backwards == self.reverse else reversed(cuts):
            yield _Block(self, cut)


class _Block:
    """Some chunks of all sequences as rows R = B * c, in the accumulation type."""

    def __init__(self, part: _Chunks, cut: slice) -> None:
        inputs, q = part.inputs, part.q
        start = part.time.start
        self.q, self.reverse, self.kind = q, part.reverse, part.dt.dtype
        self.time = slice(start + cut.start * q, start + cut.stop * q)
        self.count = cut.stop - cut.start
        self.last = 0 if part.reverse else -1  # the step at which a chunk hands its state on
        self.x = self.load(inputs.x)  # (R, Q, H, P)
        self.B = self.load(inputs.B)  # (R, Q, N)
        self.C = self.load(inputs.C)
        self.shape = self.x.shape
        self.dt, self.from_start, self.to_end, write = (
            v[:, cut].flatten(0, 1).unsqueeze(3)  # (R, Q, H, 1)
            for v in (part.dt, part.from_start, part.to_end, part.write)
        )
        self.a = part.a[:, cut].flatten(0, 2)  # (R * H, Q)
        self.decay = part.decay[:, cut]  # (B, c, H)
        self.xw = self.x * write

    def load(self, v: Tensor) -> Tensor:
        """The block's steps of (B, T, ...) as (R, Q, ...); a view where that is possible."""
        return v[:, self.time].to(self.kind).reshape(-1, self.q, *v.shape[2:])

    def of(self, v: Tensor) -> Tensor:
        """The block's steps of (B, T, ...) as (B, c, Q, ...), to write to."""
        return v[:, self.time].unflatten(1, (self.count, self.q))

    def by_sequence(self, v: Tensor) -> Tensor:
        """(R, ...) -> (B, c, ...), a view."""
        return v.unflatten(0, (-1, self.count))

    def by_head(self, v: Tensor) -> Tensor:
        """(R * H, ...) -> (R, H, ...), a view."""
        return v.unflatten(0, (-1, self.shape[2]))

    def heads_last(self, v: Tensor) -> Tensor:
        """(R * H, Q, P) -> (R, Q, H, P), a view."""
        return self.by_head(v).transpose(1, 2)

    def heads_first(self, v: Tensor, factor: Tensor | None = None) -> Tensor:
        """(R, Q, H, P) -> (R * H, Q, P), contiguous; times `factor` (R, Q, H, 1)."""
        turned = v.transpose(1, 2)
        if factor is None:
            return turned.flatten(0, 1)
        place = torch.empty(turned.shape, dtype=v.dtype, device=v.device)
        return torch.mul(turned, factor.transpose(1, 2), out=place).flatten(0, 1)

    def pass_states(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """States at the start of each chunk (R, N, HP), from the one before the block (B, N, HP).

        Also the state after the block.
        """
        return self._pass_on(torch.bmm(self.B.mT, self.xw.flatten(2)), h, self.reverse)

    def pass_gradients(self, through: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states at the end of each chunk, and of the state before the block.

        `through` (R, N, HP) is what reaches the start of each chunk from within it, `g` (B, N, HP)
        what reaches the end of the block.
        """
        return self._pass_on(through, g, not self.reverse)

    def _pass_on(self, added: Tensor, h: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """From chunk to chunk: h becomes decay * h + added. All h before a chunk, and the last."""
        order = range(self.count)[::-1] if backwards else range(self.count)
        before = torch.empty_like(added)
        add, seen = self.by_sequence(added).unbind(1), self.by_sequence(before).unbind(1)
        decay = self.decay.repeat_interleave(self.shape[3], 2).unsqueeze(2).unbind(1)
        seen[order[0]].copy_(h)
        for i, following in pairwise(order):
            torch.addcmul(add[i], seen[i], decay[i], out=seen[following])
        i = order[-1]
        return before, torch.addcmul(add[i], seen[i], decay[i])

    def cut(self, v: Tensor, diagonal: int = 0) -> Tensor:
        """Zero in place where a step would hear from one that comes later in the run."""
        return v.triu_(diagonal) if self.reverse else v.tril_(-diagonal)

    def scores(self) -> Tensor:
        """G = C B^T (R, Q, Q), zero where a step comes too late."""
        return self.cut(torch.bmm(self.C, self.B.mT))

    def decays(self) -> Tensor:
        """L (R * H, Q, Q), valid where G is not cut to zero.

        Where it is, a_i - a_j would be positive and could overflow: the difference is cut to zero.
        """
        return (self.a.unsqueeze(2) - self.a.unsqueeze(1)).clamp_(max=0).exp2_()
