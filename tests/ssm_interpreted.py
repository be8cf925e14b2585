# ruff: noqa: E402
"""mamba-ssm's own code on the CPU, beside ours: prints one JSON object {case: largest difference}.

Run as a script in a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
Patches, for this comparison only: a null context in place of `torch.cuda.device`, one
multiprocessor as the device's property, and one configuration for each autotuned kernel. The empty
module in place of the CUDA extension is the library's own doing: see `tvg_lib.ssm.kernels`.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch

torch.cuda.device = lambda *_: nullcontext()  # type: ignore[assignment,misc]
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=1)
torch.set_num_threads(1)

from tvg_lib.ssm import kernels

assert kernels.chunk_scan().call, kernels.chunk_scan().reason  # before the imports below: see above
assert kernels.selective_scan().call is None, "this comparison is for builds without CUDA"

from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.mamba2 import Mamba2 as TheirMamba2
from mamba_ssm.ops import selective_scan_interface as s6
from mamba_ssm.ops.triton import (
    layernorm_gated,
    ssd_bmm,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_combined,
    ssd_state_passing,
)

from tvg_lib.ssm import Mamba, Mamba2, s6_scan, ssd_scan

for module in (
    layernorm_gated,
    ssd_bmm,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_combined,
    ssd_state_passing,
):
    for kernel in vars(module).values():
        if hasattr(kernel, "configs") and hasattr(kernel, "fn"):
            kernel.configs = kernel.configs[:1]

errors: dict[str, float] = {}


def compare(case: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Record the largest difference, relative to the largest value."""
    scale = max(1.0, theirs.abs().max().item())
    errors[case] = (ours - theirs).abs().max().item() / scale


def gradients(y: torch.Tensor, state: torch.Tensor, leaves: list[torch.Tensor]) -> list:
    """Gradients of a fixed random projection of both outputs."""
    g = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=g)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=g)).sum()
    return torch.autograd.grad(loss, leaves)


def ssd_cases() -> None:
    """SSD: their Triton kernels and their PyTorch reference; ours through both of our paths."""
    torch.manual_seed(0)
    b, t, h, p, n = 2, 96, 2, 16, 16
    for groups in (1, 2):
        x, dt = torch.randn(b, t, h, p), torch.randn(b, t, h)
        A, D, bias = -torch.rand(h) * 4 - 0.1, torch.randn(h), torch.randn(h)
        B, C = torch.randn(b, t, groups, n), torch.randn(b, t, groups, n)
        start = torch.randn(b, h, p, n)
        leaves = [v.requires_grad_() for v in (x, dt, A, B, C, D, bias, start)]
        name = f"ssd kernel, {groups} groups"
        y, state = ssd_combined.mamba_chunk_scan_combined(
            x, dt, A, B, C, 32, D=D, dt_bias=bias, initial_states=start,
            dt_softplus=True, return_final_states=True,
        )  # fmt: skip
        ours = {"D": D, "dt_bias": bias, "dt_softplus": True, "initial_state": start}
        y_ours, state_ours = ssd_scan(x, dt, A, B, C, **ours)
        compare(f"{name}: y", y_ours, y)
        compare(f"{name}: state", state_ours, state)
        if groups > 1:  # the interpreter takes seconds for a backward pass
            continue
        for leaf, mine, other in zip(
            ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"],
            gradients(y_ours, state_ours, leaves),
            gradients(y, state, leaves),
            strict=True,
        ):
            compare(f"{name}: gradient of {leaf}", mine, other)
    with torch.no_grad():
        y = ssd_combined.ssd_chunk_scan_combined_ref(
            x, dt, A, B, C, 32, D=D, dt_bias=bias, dt_softplus=True
        )
        compare("ssd PyTorch reference", ssd_scan(x, dt, A, B, C, D=D, dt_bias=bias,
                dt_softplus=True)[0], y)  # fmt: skip
        mask = torch.arange(t) < torch.tensor([[t], [50]])
        for backend in ("reference", "mamba_ssm"):
            ours, state = ssd_scan(
                x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, mask=mask, backend=backend
            )
            if backend == "reference":
                y, last = ours, state
        compare("ssd kernel with a mask: y", ours, y)
        compare("ssd kernel with a mask: state", state, last)


def s6_cases() -> None:
    """S6: their PyTorch reference (the kernel is CUDA)."""
    torch.manual_seed(1)
    b, t, d, n = 2, 70, 12, 8
    x, dt, z = torch.randn(b, t, d), torch.randn(b, t, d), torch.randn(b, t, d)
    A, D, bias = -torch.rand(d, n) * 4 - 0.1, torch.randn(d), torch.randn(d)
    B, C = torch.randn(b, t, n), torch.randn(b, t, n)
    leaves = [v.requires_grad_() for v in (x, dt, A, B, C, D, z, bias)]
    y, state = s6.selective_scan_ref(
        x.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2),
        D, z.transpose(1, 2), bias, True, True,
    )  # fmt: skip
    y = y.transpose(1, 2)
    y_ours, state_ours = s6_scan(x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True)
    compare("s6 PyTorch reference: y", y_ours, y)
    compare("s6 PyTorch reference: state", state_ours, state)
    for leaf, ours, other in zip(
        ["x", "dt", "A", "B", "C", "D", "z", "dt_bias"],
        gradients(y_ours, state_ours, leaves),
        gradients(y, state, leaves),
        strict=True,
    ):
        compare(f"s6 PyTorch reference: gradient of {leaf}", ours, other)


def layer_cases() -> None:
    """Whole layers: their modules' state dicts load into ours and give the same output."""
    torch.manual_seed(2)
    x = torch.randn(1, 40, 32)
    mamba_simple.selective_scan_fn = s6.selective_scan_ref
    theirs = mamba_simple.Mamba(32, d_state=8, use_fast_path=False)
    ours = Mamba(32, d_state=8)
    ours.load_state_dict(theirs.state_dict())
    compare("Mamba layer", ours(x), theirs(x))
    for groups, before in ((1, False), (2, False), (1, True)):
        theirs = TheirMamba2(
            32, d_state=16, headdim=16, ngroups=groups, norm_before_gate=before,
            chunk_size=32, use_mem_eff_path=False,
        )  # fmt: skip
        torch.nn.init.uniform_(theirs.norm.weight, 0.5, 1.5)
        ours = Mamba2(32, d_state=16, headdim=16, ngroups=groups, norm_before_gate=before)
        ours.load_state_dict(theirs.state_dict())
        compare(f"Mamba2 layer, {groups} groups, norm before gate {before}", ours(x), theirs(x))


for part in (ssd_cases, s6_cases, layer_cases):
    started = time.process_time()
    part()
    print(f"{part.__name__}: {time.process_time() - started:.1f} s", file=sys.stderr, flush=True)
print(json.dumps(errors))
