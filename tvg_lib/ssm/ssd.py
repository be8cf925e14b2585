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
from tvg_lib.nn.gradients import first_order
from tvg_lib.ssm import kernels
from tvg_lib.ssm.kernels import Backend
from tvg_lib.ssm.s6 import check_shapes, silence

_LOG2E = math.log2(math.e)
_CHUNK = 64
_STEEP = 160  # powers of two by which a chunk may decay to be split into factors of 2^80
_CPU_BLOCK = 1 << 19  # numbers of `x` taken at once
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


@torch.compiler.disable  # loops over blocks, with their own backward pass: nothing to gain
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
        chunk_size: steps that attend to one another directly. None: 64 in PyTorch, 256 in the
            kernel. It never changes the result beyond rounding.
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

    Everything is a large matrix product over all heads, in the layout the inputs already have:
    states are (N, H * P), chunks (Q, H * P). That is possible because the decay between two steps
    of a chunk splits into two factors, exp(a_i - r) exp(r - a_j), of which one scales the input and
    one the output; the attention C B^T between them is the same for all heads. r is the middle of
    the chunk, so that neither factor leaves the range of float32, unless a chunk is too steep: then
    each head gets its matrix of decays. Chunks are taken a block at a time, so that what is formed
    on the way stays in the cache. Kept for the backward pass: the inputs, the state at the start of
    each chunk (as many numbers as `x` when Q = N), and what each step hears of the others. What it
    hears of itself does not decay, nor what the last step of a chunk writes to its end; both are
    kept apart because the gradient of the decay is a difference of sums that they would swamp.

    Rounding: a_i - a_j is a difference of sums over at most Q steps, whose rounding would enter the
    result relative to exp(a_i - a_j); so the sums and the factors made of them are float64.
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
                    others = block.read(starts).mul_(block.fade)
                    if part.steep:
                        attention = block.heads(block.decays()).mul_(block.scores().unsqueeze(1))
                        xd = block.heads_first(block.x, block.dt)
                        others += block.heads_last(torch.bmm(attention.flatten(0, 1), xd))
                    kept += [starts, others]
                    own = block.own * block.dt
                    own = own if inputs.D is None else own + _per_channel(inputs.D)
                    block.of(y).copy_(block.sequences(torch.addcmul(others, block.x, own)))
        ctx.save_for_backward(*tensors, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.q, ctx.reverse = q, reverse
        return y, h.view(batch, n, heads, channels).permute(0, 2, 3, 1).contiguous()

    @staticmethod
    @first_order
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
                    others, starts = kept.pop(), kept.pop()
                    out = block.load(dy)
                    faded = (out * block.fade).flatten(2)
                    ends, g = block.pass_gradients(faded, g)
                    dC_block = torch.bmm(faded, starts.mT)
                    dB_block = torch.bmm(block.written, ends.mT)
                    dwritten = torch.bmm(block.B, ends)
                    # h_end, through both of its terms, depends on the sum over the chunk
                    da_end = block.per_head((ends * starts).sum(1)) * block.rest
                    kept_on = dwritten * block.written
                    kept_on[:, block.last] = 0  # the last step writes undecayed
                    da_end += block.per_head(kept_on.sum(1))
                    if part.steep:  # others_i holds sum_{j < i} G_ij L_ij xd_j for each head
                        decays = block.decays()
                        attention = block.heads(decays) * block.scores().unsqueeze(1)
                        out_h, xd_h = block.heads_first(out), block.heads_first(block.x, block.dt)
                        dxd = block.heads_last(torch.bmm(attention.flatten(0, 1).mT, out_h))
                        weighted = torch.bmm(out_h, xd_h.mT).mul_(decays)
                        dG = block.cut(block.heads(weighted).sum(1), 0)
                    else:  # fade_i sum_{j < i} G_ij written_j
                        dwritten.baddbmm_(block.scores().mT, faded)
                        dG = block.cut(torch.bmm(faded, block.written.mT), 0)
                    dC_block.baddbmm_(dG, block.B)
                    dB_block.baddbmm_(dG.mT, block.C)
                    dwritten = dwritten.view(block.shape)
                    ddt_block = (dwritten * block.x).sum(3, keepdim=True).mul_(block.reach)
                    dx_block = dwritten.mul_(block.write)
                    if part.steep:
                        ddt_block += (dxd * block.x).sum(3, keepdim=True)
                        dx_block.addcmul_(dxd, block.dt)
                    heard_later = ddt_block * block.dt
                    heard_later[:, block.last] = 0  # by nobody in this chunk
                    da_block = (others * out).sum(3, keepdim=True) - heard_later
                    da_block[:, block.last] += da_end.unsqueeze(2)
                    # what a step hears of itself, which does not decay
                    own, own_x = block.own * block.dt, out * block.x
                    ddt_block.addcmul_(own_x.sum(3, keepdim=True), block.own)
                    if D is not None:
                        own = own + _per_channel(D)
                        dD += own_x.sum((0, 1))
                    dx_block.addcmul_(out, own)
                    for whole, rows in (
                        (dx, dx_block),
                        (ddt, ddt_block.squeeze(3)),
                        (da, da_block.squeeze(3)),
                        (dB, dB_block),
                        (dC, dC_block),
                    ):
                        block.of(whole).copy_(block.sequences(rows))
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
    """Consecutive chunks of one length: their decays, and how they are cut into blocks.

    Factors, each (B, c, Q, H) or, for the whole chunk, (B, c, H): with written_j = write_j x_j and
    G = C B^T, a step hears fade_i (C_i (start h_start) + sum_{j < i} G_ij written_j) of the others
    (in a steep chunk the sum is left out), and h_end = end (rest start h_start + sum written B).
    """

    def __init__(self, inputs: _Inputs, time: slice, q: int, reverse: bool) -> None:
        self.inputs, self.time, self.q, self.reverse = inputs, time, q, reverse
        self.dt = self.chunked(inputs.dt)
        # a_i in powers of two: exp2 is faster than exp. In float64: a factor of 2^80 would keep the
        # rounding of its exponent. There is one number a head and step, so it costs nothing.
        kind = self.dt.dtype
        exact = kind if self.dt.device.type == "mps" else torch.float64  # which Apple's lack
        self.a = self.running_sum(self.dt.to(exact) * (inputs.A.to(exact) * _LOG2E), reverse)
        first, last = self.a[:, :, :1], self.a[:, :, -1:]
        if reverse:
            first, last = last, first
        self.steep = not (first - last).max() <= _STEEP
        middle = last if self.steep else (first + last) / 2
        fade = self.a if self.steep else self.a - middle
        start = torch.zeros_like(middle) if self.steep else middle
        self.fade, self.reach = (torch.exp2(v).to(kind) for v in (fade, middle - self.a))
        self.write = self.reach * self.dt
        self.start, self.end, self.decay, self.rest = (
            torch.exp2(v.squeeze(2)).to(kind)
            for v in (start, last - middle, last, last - (last - middle) - start)
        )

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
        size = max(1, room // (batch * heads * self.q * self.inputs.x.shape[3]))
        cuts = [slice(i, min(i + size, count)) for i in range(0, count, size)]
        for cut in cuts if backwards == self.reverse else reversed(cuts):
            yield _Block(self, cut)


class _Block:
    """Some chunks of all sequences as rows R = B * c, in the accumulation type."""

    def __init__(self, part: _Chunks, cut: slice) -> None:
        inputs, q = part.inputs, part.q
        begin = part.time.start
        self.part, self.q, self.kind = part, q, part.dt.dtype
        self.time = slice(begin + cut.start * q, begin + cut.stop * q)
        self.slice = cut
        self.count = cut.stop - cut.start
        self.last = 0 if part.reverse else -1  # the step at which a chunk hands its state on
        self.x = self.load(inputs.x)  # (R, Q, H, P)
        self.B = self.load(inputs.B)  # (R, Q, N)
        self.C = self.load(inputs.C)
        self.shape = self.x.shape
        self.dt, self.fade, self.reach, self.write = (
            v[:, cut].flatten(0, 1).unsqueeze(3)  # (R, Q, H, 1)
            for v in (part.dt, part.fade, part.reach, part.write)
        )
        self.rest = part.rest[:, cut].flatten(0, 1)  # (R, H)
        self.own = (self.C * self.B).sum(2)[:, :, None, None]  # (R, Q, 1, 1), the diagonal of G
        self.written = (self.x * self.write).flatten(2)  # (R, Q, HP)

    def load(self, v: Tensor) -> Tensor:
        """The block's steps of (B, T, ...) as (R, Q, ...); a view where that is possible."""
        return v[:, self.time].to(self.kind).reshape(-1, self.q, *v.shape[2:])

    def of(self, v: Tensor) -> Tensor:
        """The block's steps of (B, T, ...) as (B, c, Q, ...), to write to."""
        return v[:, self.time].unflatten(1, (self.count, self.q))

    def sequences(self, v: Tensor) -> Tensor:
        """(R, ...) -> (B, c, ...), a view."""
        return v.unflatten(0, (-1, self.count))

    def heads(self, v: Tensor) -> Tensor:
        """(R * H, ...) -> (R, H, ...), a view."""
        return v.unflatten(0, (-1, self.shape[2]))

    def heads_last(self, v: Tensor) -> Tensor:
        """(R * H, Q, P) -> (R, Q, H, P), a view."""
        return self.heads(v).transpose(1, 2)

    def heads_first(self, v: Tensor, factor: Tensor | None = None) -> Tensor:
        """(R, Q, H, P) -> (R * H, Q, P), contiguous; times `factor` (R, Q, H, 1)."""
        turned = v.transpose(1, 2)
        return (turned if factor is None else turned * factor.transpose(1, 2)).flatten(0, 1)

    def per_head(self, v: Tensor) -> Tensor:
        """Sum of (R, HP) over the channels of each head: (R, H)."""
        return v.unflatten(1, (self.shape[2], -1)).sum(2)

    def rows(self, v: Tensor) -> Tensor:
        """A factor of whole chunks (B, c, H) -> (R, 1, HP)."""
        return v[:, self.slice].flatten(0, 1).repeat_interleave(self.shape[3], 1).unsqueeze(1)

    def pass_states(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """`start` h_start of each chunk (R, N, HP), from the state before the block (B, N, HP).

        Also the state after the block.
        """
        added = torch.bmm(self.B.mT, self.written).mul_(self.rows(self.part.end))
        starts, h = self._pass_on(added, h, self.part.reverse)
        return starts.mul_(self.rows(self.part.start)), h

    def pass_gradients(self, faded: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of h_end / `end` of each chunk (R, N, HP), and of the state before the block.

        `faded` (R, Q, HP) is the gradient of the output, faded like it; `g` (B, N, HP) what reaches
        the end of the block.
        """
        through = torch.bmm(self.C.mT, faded).mul_(self.rows(self.part.start))
        ends, g = self._pass_on(through, g, not self.part.reverse)
        return ends.mul_(self.rows(self.part.end)), g

    def _pass_on(self, added: Tensor, h: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """From chunk to chunk: h becomes decay * h + added. All h before a chunk, and the last."""
        order = range(self.count)[::-1] if backwards else range(self.count)
        before = torch.empty_like(added)
        add, seen, decay = (
            self.sequences(v).unbind(1) for v in (added, before, self.rows(self.part.decay))
        )
        seen[order[0]].copy_(h)
        for i, following in pairwise(order):
            torch.addcmul(add[i], seen[i], decay[i], out=seen[following])
        i = order[-1]
        return before, torch.addcmul(add[i], seen[i], decay[i])

    def read(self, starts: Tensor) -> Tensor:
        """What the steps hear of the others, before it fades: (R, Q, H, P)."""
        seen = torch.bmm(self.C, starts)
        if not self.part.steep:
            seen.baddbmm_(self.scores(), self.written)
        return seen.view(self.shape)

    def cut(self, v: Tensor, diagonal: int) -> Tensor:
        """Zero in place where a step would hear from later in the run; 1: or from itself."""
        return v.triu_(diagonal) if self.part.reverse else v.tril_(-diagonal)

    def scores(self) -> Tensor:
        """G = C B^T (R, Q, Q) between each step and those before it."""
        return self.cut(torch.bmm(self.C, self.B.mT), 1)

    def decays(self) -> Tensor:
        """L (R * H, Q, Q), valid where G is not cut to zero.

        Where it is, a_i - a_j would be positive and could overflow: the difference is cut to zero.
        """
        a = self.part.a[:, self.slice].transpose(2, 3).flatten(0, 2)  # (R * H, Q)
        return (a.unsqueeze(2) - a.unsqueeze(1)).to(self.kind).clamp_(max=0).exp2_()
