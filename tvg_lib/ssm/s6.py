"""S6, the selective scan of Mamba-1 (Gu and Dao 2023, section 3.2, algorithm 2).

    paper            here           meaning
    x_t              x    (B, T, D)  input, one scalar per channel and step
    Delta_t          dt   (B, T, D)  step size; softplus(dt + dt_bias) when `dt_softplus`
    A                A    (D, N)     diagonal of the state matrix, negative
    B_t, C_t         B, C (B, T, N)  what is written to the state, what is read from it
    h_t              state (B, D, N) the state
    D                D    (D,)       skip connection
    -                z    (B, T, D)  gate: the output is multiplied by SiLU(z)

    h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T        y_t = h_t C_t + D x_t

(The input matrix is discretised by Delta_t B_t, as in the authors' code.) Three forms compute it:
`s6_reference` step by step, `s6_scan(..., backend="torch")` in blocks, and mamba-ssm's CUDA kernel.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tvg_lib.errors import DataError
from tvg_lib.nn.gradients import first_order
from tvg_lib.ssm import kernels
from tvg_lib.ssm.kernels import Backend

_LOG2E = math.log2(math.e)
_CPU_BLOCK = 1 << 20  # states held at once: two buffers of 4 MB stay in the last-level cache
_GPU_BLOCK = 1 << 26
_MIN_STEPS = 16  # one kept state per >= 16 steps: at N = 16 no more memory than the input itself


def s6_reference(
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
        y (B, T, D) and the state after the last step (B, D, N).
    """
    batch, steps, width = x.shape
    h = x.new_zeros(batch, width, A.shape[1]) if state is None else state
    outputs = []
    for t in range(steps):
        decay = torch.exp(dt[:, t, :, None] * A)
        h_next = decay * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y = (h_next * C[:, t, None, :]).sum(-1)
        if mask is None:
            h = h_next
        else:
            h = torch.where(mask[:, t, None, None], h_next, h)
            y = torch.where(mask[:, t, None], y, 0)
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
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    mask: Tensor | None = None
    initial_state: Tensor | None = None


@torch.compiler.disable  # loops over blocks, with their own backward pass: nothing to gain
def s6_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Selective scan over (B, T, D), linear in T in time and memory.

    Args:
        x, dt, A, B, C, D, z: see the module's glossary.
        dt_bias: (D,), added to `dt` before the softplus.
        dt_softplus: pass `dt + dt_bias` through softplus.
        mask: (B, T), True where valid. Other steps leave the state as it is and give zero.
        initial_state: (B, D, N), state before the first step; zeros if None.
        backend: see `tvg_lib.ssm.Backend`. mamba-ssm's kernel takes no initial state.

    Returns:
        y (B, T, D) in the type of `x`, and the state after the last step (B, D, N), float32
        (float64 for float64 input).

    Raises:
        DataError: shapes do not fit one another.
        ConfigurationError: the backend asked for cannot be used.
    """
    inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias, mask, initial_state)
    _check(inputs)
    obstacle = "the S6 kernel takes no initial state" if initial_state is not None else ""
    if kernels.wanted(backend, kernels.selective_scan, x, obstacle):
        return _kernel(inputs, dt_softplus)
    if backend == "reference":
        return _recurrence(inputs, dt_softplus)
    return _S6.apply(dt_softplus, *inputs)


def _check(inputs: _Inputs) -> None:
    x, A = inputs.x, inputs.A
    if x.dim() != 3 or A.dim() != 2 or x.shape[1] == 0:
        raise DataError(
            "s6: expected x of shape (B, T >= 1, D) and A of shape (D, N), "
            f"found {tuple(x.shape)} and {tuple(A.shape)}"
        )
    batch, steps, width = x.shape
    n = A.shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "dt": (batch, steps, width),
        "A": (width, n),
        "B": (batch, steps, n),
        "C": (batch, steps, n),
        "D": (width,),
        "z": (batch, steps, width),
        "dt_bias": (width,),
        "mask": (batch, steps),
        "initial_state": (batch, width, n),
    }
    check_shapes("s6", inputs._asdict(), expected)


def check_shapes(
    scan: str, tensors: dict[str, Tensor | None], expected: dict[str, tuple[int, ...]]
) -> None:
    """Raise `DataError` for the first tensor whose shape, or a mask whose type, is not expected."""
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise DataError(f"{scan}: {name}: expected {shape}, found {tuple(tensor.shape)}")
        if name == "mask" and tensor.dtype != torch.bool:
            raise DataError(f"{scan}: mask: expected bool, True where valid, found {tensor.dtype}")


def _recurrence(inputs: _Inputs, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """`s6_reference` with step size, skip connection and gate, in the accumulation type."""
    kind = torch.promote_types(inputs.x.dtype, torch.float32)
    cast = {k: v.to(kind) for k, v in inputs._asdict().items() if v is not None and k != "mask"}
    x, step, A, B, C, D, z, dt_bias, mask, state = inputs._replace(**cast)
    step = step if dt_bias is None else step + dt_bias
    step = F.softplus(step) if dt_softplus else step
    y, state = s6_reference(x, step, A, B, C, state, mask)
    y = y if D is None else y + D * x
    y = y if z is None else y * F.silu(z)
    y = y if mask is None else y * mask[:, :, None]
    return y.to(inputs.x.dtype), state


def _kernel(inputs: _Inputs, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """mamba-ssm's kernel; it wants channels before time, and float32 for A, D and the bias."""
    x, dt, A, B, C, D, z, dt_bias, mask, _ = inputs
    if mask is not None:
        dt = silence(dt, mask, dt_softplus, dt_bias)
    call = kernels.selective_scan().call
    assert call is not None
    y, state = call(
        x.transpose(1, 2),
        dt.to(x.dtype).transpose(1, 2),
        A.float(),
        B.to(x.dtype).transpose(1, 2),
        C.to(x.dtype).transpose(1, 2),
        None if D is None else D.float(),
        None if z is None else z.to(x.dtype).transpose(1, 2),
        None if dt_bias is None else dt_bias.float(),
        dt_softplus,
        True,
    )
    y = y.transpose(1, 2)
    return (y if mask is None else y.masked_fill(~mask[:, :, None], 0)), state


def silence(dt: Tensor, mask: Tensor, dt_softplus: bool, dt_bias: Tensor | None) -> Tensor:
    """Raw step sizes that become exactly zero at padded steps inside a kernel.

    A step of size zero multiplies the state by one and adds nothing. softplus(-1e4 + bias) is
    exactly zero in float32, and so is its gradient.
    """
    if dt_softplus:
        return dt.masked_fill(~mask[:, :, None], -1e4)
    if dt_bias is not None:
        return torch.where(mask[:, :, None], dt, -dt_bias)
    return dt.masked_fill(~mask[:, :, None], 0)


class _S6(torch.autograd.Function):
    """The scan in blocks of steps, with everything around it (step size, skip, gate) fused in.

    Within a block the decays exp(dt A) and the writes dt x B of all steps are formed at once; then
    one fused multiply-add per step turns the writes into states in place; then one batched product
    reads them. Layout (batch, step, state, channel): channels last, so every operation runs along
    contiguous memory and no input needs a transpose. exp2 replaces exp (A is scaled by log2 e): in
    PyTorch on the CPU it is about twice as fast and does not slow down when it underflows.

    For the backward pass only the state before each block is kept (one per 16 steps or more); the
    states inside a block are computed again when its turn comes, in reverse order.
    """

    @staticmethod
    def forward(ctx: Any, softplus: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(*tensors)  # type: ignore[arg-type]
        x, state = inputs.x, inputs.initial_state
        scan = _Blocks(inputs, softplus)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = x.new_zeros(scan.batch, scan.n, scan.width, dtype=scan.type)
        if state is not None:
            final.copy_(state.transpose(1, 2))
        keep = any(ctx.needs_input_grad)
        starts = []
        with torch.autocast(x.device.type, enabled=False):
            for rows in scan.rows():
                h = final[rows]
                for time in scan.times():
                    if keep:
                        starts.append(h.clone())
                    block = scan.load(rows, time)
                    states = scan.states(block, h)
                    h.copy_(states[:, -1])
                    out = scan.read(block, states)
                    if block.D is not None:
                        out.addcmul_(block.x, block.D)
                    if block.z is not None:
                        out.mul_(F.silu(block.z))
                    if block.mask is not None:
                        out.mul_(block.mask)
                    y[rows, time] = out
        ctx.save_for_backward(*tensors, *starts)
        ctx.softplus = softplus
        return y, final.transpose(1, 2).contiguous()

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        count = len(_Inputs._fields)
        inputs, starts = _Inputs(*ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        x, dt, A, B, C, D, z, dt_bias, _, state = inputs
        scan = _Blocks(inputs, ctx.softplus)
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dz = None if z is None else torch.empty_like(z)
        dA = A.new_zeros(scan.n, scan.width, dtype=scan.type)
        dD, dbias = dA.new_zeros(scan.width), dA.new_zeros(scan.width)
        g_out = dstate.transpose(1, 2).to(scan.type, copy=True)
        times = list(scan.times())
        grads = torch.empty_like(scan.writes)
        with torch.autocast(x.device.type, enabled=False):
            for i, rows in enumerate(scan.rows()):
                carry = g_out[rows]  # gradient of the state after the block, through what follows
                for j in reversed(range(len(times))):
                    time = times[j]
                    start = starts[i * len(times) + j]
                    block = scan.load(rows, time)
                    h = scan.states(block, start)
                    decay = scan.shaped(scan.decays, block)
                    g = scan.shaped(grads, block)
                    out = dy[rows, time].to(scan.type)
                    if block.mask is not None:
                        out = out * block.mask
                    if dz is not None and block.z is not None:
                        s = torch.sigmoid(block.z)
                        gate = block.z * s
                        inner = scan.read(block, h)
                        if block.D is not None:
                            inner.addcmul_(block.x, block.D)
                        dz[rows, time] = inner.mul_(out).mul_(s + gate * (1 - s))
                        out = out * gate
                    # adjoint of the recurrence: g_t = C_t dy_t + decay_{t+1} g_{t+1}
                    torch.mul(block.C.unsqueeze(3), out.unsqueeze(2), out=g)
                    steps = g.unbind(1)
                    steps[-1].add_(carry)
                    for now, after, by in zip(
                        steps[-2::-1], steps[:0:-1], decay.unbind(1)[:0:-1], strict=True
                    ):
                        now.addcmul_(by, after)
                    du = torch.matmul(block.B.unsqueeze(2), g).squeeze(2)
                    dB[rows, time] = torch.matmul(g, block.u.unsqueeze(3)).squeeze(3)
                    dC[rows, time] = torch.matmul(h, out.unsqueeze(3)).squeeze(3)
                    # gradient of the exponent dt A: g_t decay_t h_{t-1}
                    decay.mul_(g)
                    carry.copy_(decay[:, 0])
                    decay[:, 1:].mul_(h[:, :-1])
                    decay[:, 0].mul_(start)
                    torch.mul(decay, block.dt.unsqueeze(2), out=g)
                    dA += g.sum((0, 1))
                    torch.mul(decay, scan.A, out=g)
                    step = g.sum(2).addcmul_(du, block.x)
                    if ctx.softplus:  # derivative of softplus, from its value
                        step.mul_(-torch.expm1(-block.dt))
                    if block.mask is not None:
                        step.mul_(block.mask)
                    dbias += step.sum((0, 1))
                    ddt[rows, time] = step
                    du.mul_(block.dt)
                    if block.D is not None:
                        dD += (out * block.x).sum((0, 1))
                        du.addcmul_(out, block.D)
                    dx[rows, time] = du
        return (
            None,
            *_Inputs(
                dx,
                ddt,
                dA.t().to(A.dtype),
                dB,
                dC,
                D=None if D is None else dD.to(D.dtype),
                z=dz,
                dt_bias=None if dt_bias is None else dbias.to(dt_bias.dtype),
                initial_state=None if state is None else g_out.transpose(1, 2),
            ),
        )


class _Block:
    """The inputs of one block (b rows, k steps), in the accumulation type."""

    __slots__ = ("B", "C", "D", "dt", "mask", "u", "x", "z")
    x: Tensor  # (b, k, D)
    dt: Tensor  # (b, k, D), final step size, zero where padded
    u: Tensor  # (b, k, D), dt * x
    B: Tensor  # (b, k, N)
    C: Tensor  # (b, k, N)
    D: Tensor | None  # (D,)
    z: Tensor | None  # (b, k, D)
    mask: Tensor | None  # (b, k, 1), ones and zeros


class _Blocks:
    """Cuts a scan into blocks whose states fit the cache, and owns the two state buffers."""

    def __init__(self, inputs: _Inputs, softplus: bool) -> None:
        x, A, D, dt_bias = inputs.x, inputs.A, inputs.D, inputs.dt_bias
        self.inputs = inputs
        self.type = torch.promote_types(x.dtype, torch.float32)
        self.batch, self.length, self.width = x.shape
        self.n = A.shape[1]
        self.A = A.t().to(self.type).contiguous()  # (N, D)
        self.A2 = self.A * _LOG2E
        self.D = None if D is None else D.to(self.type)
        self.dt_bias = None if dt_bias is None else dt_bias.to(self.type)
        self.softplus = softplus
        room = _GPU_BLOCK if x.is_cuda else _CPU_BLOCK
        state = self.n * self.width
        self.size = min(self.batch, max(1, room // (_MIN_STEPS * state)))
        self.steps = min(self.length, max(_MIN_STEPS, room // (self.size * state)))
        self.decays = torch.empty(self.size * self.steps * state, dtype=self.type, device=x.device)
        self.writes = torch.empty_like(self.decays)

    def rows(self) -> list[slice]:
        return [slice(i, i + self.size) for i in range(0, self.batch, self.size)]

    def times(self) -> list[slice]:
        return [slice(t, t + self.steps) for t in range(0, self.length, self.steps)]

    def load(self, rows: slice, time: slice) -> _Block:
        x, dt, _, B, C, _, z, _, mask, _ = self.inputs
        block = _Block()
        block.x = x[rows, time].to(self.type)
        block.B = B[rows, time].to(self.type)
        block.C = C[rows, time].to(self.type)
        block.D = self.D
        block.z = None if z is None else z[rows, time].to(self.type)
        step = dt[rows, time].to(self.type)
        if self.dt_bias is not None:
            step = step + self.dt_bias
        if self.softplus:
            step = F.softplus(step)
        block.mask = None if mask is None else mask[rows, time].unsqueeze(2).to(self.type)
        block.dt = step if block.mask is None else step * block.mask
        block.u = block.dt * block.x
        return block

    def shaped(self, buffer: Tensor, block: _Block) -> Tensor:
        """The front of a flat buffer as (b, k, N, D)."""
        b, k, _ = block.x.shape
        return buffer[: b * k * self.n * self.width].view(b, k, self.n, self.width)

    def states(self, block: _Block, h: Tensor) -> Tensor:
        """States of all steps of the block (b, k, N, D), from the state `h` (b, N, D) before it."""
        decays, states = self.shaped(self.decays, block), self.shaped(self.writes, block)
        torch.mul(block.dt.unsqueeze(2), self.A2, out=decays).exp2_()
        torch.mul(block.u.unsqueeze(2), block.B.unsqueeze(3), out=states)
        for by, now in zip(decays.unbind(1), states.unbind(1), strict=True):
            h = now.addcmul_(by, h)
        return states

    @staticmethod
    def read(block: _Block, states: Tensor) -> Tensor:
        """C_t applied to the states: (b, k, D)."""
        return torch.matmul(block.C.unsqueeze(2), states).squeeze(2)
