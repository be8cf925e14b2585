"""State-space layers: hand-computed cases, three forms against one another, padding, streaming."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.ssm import (
    DepthwiseConv,
    Hydra,
    Mamba,
    Mamba2,
    MambaState,
    kernels,
    s6,
    s6_reference,
    s6_scan,
    ssd,
    ssd_reference,
    ssd_scan,
)

HERE = Path(__file__).parent
LAYERS = {
    "mamba": lambda **kw: Mamba(12, d_state=6, **kw),
    "mamba2": lambda **kw: Mamba2(16, d_state=6, headdim=8, ngroups=2, **kw),
    "hydra": lambda **kw: Hydra(16, d_state=6, headdim=8, ngroups=2, **kw),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that short inputs already cross their borders."""
    monkeypatch.setattr(s6, "_CPU_BLOCK", 1)
    monkeypatch.setattr(ssd, "_CPU_BLOCK", 1)


def s6_inputs(batch: int, steps: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    width, n = 5, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, steps, width),
        "dt": normal(batch, steps, width),
        "A": -normal(width, n).exp(),
        "B": normal(batch, steps, n),
        "C": normal(batch, steps, n),
        "D": normal(width),
        "z": normal(batch, steps, width),
        "dt_bias": normal(width),
        "initial_state": normal(batch, width, n),
    }


def ssd_inputs(
    batch: int, steps: int, dtype: torch.dtype, groups: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    heads, channels, n = 4, 3, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, steps, heads, channels),
        "dt": normal(batch, steps, heads),
        "A": -normal(heads).exp(),
        "B": normal(batch, steps, groups, n),
        "C": normal(batch, steps, groups, n),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, channels, n),
    }


def run(scan, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Outputs and all gradients of one scan, by name."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = scan(**leaves, dt_softplus=True, **options)
    g = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device=y.device)
    for output in (y, state):
        weight = torch.randn(output.shape, generator=g, dtype=torch.float64)
        loss = loss + (output * weight.to(y.device)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = {"y": y, "state": state, **dict(zip(leaves, grads, strict=True))}
    return {name: v.cpu() for name, v in named.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    for name in a:
        scale = max(1.0, b[name].abs().max().item())
        error = (a[name].double() - b[name].double()).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error}"


# -- the recurrences mean what the papers say ----------------------------------------------------


def test_s6_is_an_exponential_average_by_hand() -> None:
    one = torch.ones(1, 3, 1, dtype=torch.float64)
    x = torch.tensor([[[1.0], [2.0], [4.0]]], dtype=torch.float64)
    A = torch.full((1, 1), -math.log(2), dtype=torch.float64)  # a step of size one halves the state
    for backend in ("reference", "torch"):
        y, state = s6_scan(x, one, A, one, 3 * one, backend=backend)
        torch.testing.assert_close(y[0, :, 0], torch.tensor([3.0, 7.5, 15.75]).double())
        torch.testing.assert_close(state[0, 0, 0], torch.tensor(5.25).double())


def test_ssd_is_masked_attention() -> None:
    inputs = ssd_inputs(1, 9, torch.float64, groups=2)
    x, A, B, C = (inputs[k] for k in "xABC")
    dt = inputs["dt"].exp()
    y, _ = ssd_reference(x, dt, A, B, C)
    for h in range(4):
        a = torch.cumsum(dt[0, :, h] * A[h], 0)
        decay = torch.exp(a[:, None] - a[None, :]).tril()
        matrix = (C[0, :, h // 2] @ B[0, :, h // 2].T) * decay * dt[0, :, h]
        torch.testing.assert_close(y[0, :, h], matrix @ x[0, :, h])


def test_ssd_equals_s6_when_all_channels_of_a_head_decay_alike() -> None:
    inputs = ssd_inputs(2, 20, torch.float64)
    x, A, B, C = (inputs[k] for k in "xABC")
    dt = inputs["dt"].exp()
    y, state = ssd_reference(x, dt, A, B, C)
    wide = dt.repeat_interleave(3, 2)
    y6, state6 = s6_reference(
        x.flatten(2), wide, A.repeat_interleave(3)[:, None].expand(-1, 5), B[:, :, 0], C[:, :, 0]
    )
    torch.testing.assert_close(y.flatten(2), y6)
    torch.testing.assert_close(state.flatten(1, 2), state6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 700])
def test_depthwise_convolution_equals_conv1d(causal: bool, steps: int) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(4, 5, bias=True, causal=causal).double()
    x = torch.randn(2, steps, 4, dtype=torch.float64, requires_grad=True)
    padding = (4, 0) if causal else (2, 2)
    plain = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.transpose(1, 2), padding), conv.weight, conv.bias, groups=4
    ).transpose(1, 2)
    plain = plain * torch.sigmoid(plain)
    y = conv(x)
    torch.testing.assert_close(y, plain)
    weight = torch.randn(y.shape, dtype=torch.float64)
    leaves = [x, conv.weight, conv.bias]
    for ours, theirs in zip(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((plain * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_hydra_is_a_quasiseparable_matrix() -> None:
    torch.manual_seed(0)
    layer = Hydra(8, d_state=3, headdim=8, d_conv=3).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    z, inner, dt = layer.in_proj(x).split([16, 16 + 12, 4], 2)
    u, B, C, B_back, C_back = layer.conv1d(inner)[0].split([16, 3, 3, 3, 3], 1)
    dt = torch.nn.functional.softplus(dt[0].unflatten(1, (2, 2)) + layer.dt_bias)  # (T, 2, H)
    diagonal = u @ layer.fc_D.weight.T + layer.D
    A = -layer.A_log.exp()
    heads = []
    for h in range(2):
        M = torch.diag(diagonal[:, h])
        for i in range(7):
            for j in range(i):  # what i hears from j < i is read at step i - 1, one step early
                decay = torch.exp(A[h] * dt[j + 1 : i, 0, h].sum())
                M[i, j] = C[i - 1] @ B[j] * decay * dt[j, 0, h]
            for j in range(i + 1, 7):
                decay = torch.exp(A[h] * dt[i + 1 : j, 1, h].sum())
                M[i, j] = C_back[i + 1] @ B_back[j] * decay * dt[j, 1, h]
        heads.append(M @ u[:, 8 * h : 8 * h + 8])
    y = torch.cat(heads, 1)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    y = layer.out_proj(y * z[0] * torch.sigmoid(z[0]))
    torch.testing.assert_close(layer(x)[0], y)


# -- the three forms agree -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 16, 17, 70])
@pytest.mark.usefixtures("small_blocks")
def test_s6_fast_path_equals_the_recurrence(steps: int, dtype: torch.dtype) -> None:
    inputs = s6_inputs(3, steps, dtype)
    mask = torch.arange(steps) < torch.tensor([[steps], [steps // 2], [1]])
    for options in ({}, {"mask": mask}):
        a = run(s6_scan, inputs, backend="torch", **options)
        b = run(s6_scan, inputs, backend="reference", **options)
        assert_same(a, b, 1e-12 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 16, 17, 70])
@pytest.mark.usefixtures("small_blocks")
def test_ssd_fast_path_equals_the_recurrence(steps: int, dtype: torch.dtype) -> None:
    mask = torch.arange(steps) < torch.tensor([[steps], [steps // 2], [1]])
    for groups, options in ((1, {}), (2, {"mask": mask})):
        inputs = ssd_inputs(3, steps, dtype, groups)
        a = run(ssd_scan, inputs, backend="torch", chunk_size=16, **options)
        b = run(ssd_scan, inputs, backend="reference", **options)
        assert_same(a, b, 1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.usefixtures("small_blocks")
def test_reverse_means_flipped_along_time(backend: str) -> None:
    steps = 45  # two whole chunks and a rest
    mask = torch.arange(steps) < torch.tensor([[steps], [20], [1]])
    for groups, chosen in ((1, mask), (2, mask), (1, None)):
        inputs = ssd_inputs(3, steps, torch.float64, groups)
        turned = {k: v.flip(1) if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        if groups == 1:  # without a skip the padding is silenced another way
            del inputs["D"], turned["D"]

        def backwards(turned_mask: Tensor | None = None, **values) -> tuple[Tensor, Tensor]:
            y, state = ssd_scan(**values, backend="reference", mask=turned_mask)
            return y.flip(1), state

        a = run(ssd_scan, inputs, backend=backend, chunk_size=16, mask=chosen, reverse=True)
        b = run(backwards, turned, turned_mask=None if chosen is None else chosen.flip(1))
        for name in ("x", "dt", "B", "C"):
            b[name] = b[name].flip(1)
        assert_same(a, b, 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(2, 13, layer.in_proj.in_features, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(13) < torch.tensor([[13], [8]])
    leaves = dict(layer.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(leaves, values, strict=True))
        return torch.func.functional_call(layer, weights, (x, mask))

    assert torch.autograd.gradcheck(call, (x, *leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_refused_not_wrong(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(1, 9, layer.in_proj.in_features, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_may_be_compiled(name: str) -> None:
    """The scan steps out of the graph; "aot_eager" traces as the compiler does, without one."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 20, layer.in_proj.in_features, requires_grad=True)
    mask = torch.arange(20) < torch.tensor([[20], [12]])
    leaves = [x, *layer.parameters()]
    outcome = []
    for form in (layer, torch.compile(layer, backend="aot_eager")):
        y = form(x, mask)
        outcome.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(outcome[1], outcome[0])


@pytest.mark.parametrize("scan", [s6_scan, ssd_scan])
def test_optional_arguments_may_be_absent(scan) -> None:
    inputs = (s6_inputs if scan is s6_scan else ssd_inputs)(2, 20, torch.float64)
    inputs = {k: inputs[k] for k in ("x", "dt", "A", "B", "C")}
    assert_same(run(scan, inputs, backend="torch"), run(scan, inputs, backend="reference"), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.usefixtures("small_blocks")
def test_gradcheck(backend: str) -> None:
    mask = torch.tensor([[True] * 18, [True] * 11 + [False] * 7])
    for scan, inputs in (
        (s6_scan, s6_inputs(2, 18, torch.float64)),
        (ssd_scan, ssd_inputs(2, 18, torch.float64)),
    ):
        leaves = [v.requires_grad_() for v in inputs.values()]

        def call(*values: Tensor, scan=scan, names=tuple(inputs)) -> tuple[Tensor, Tensor]:
            options = {"chunk_size": 5} if scan is ssd_scan else {}
            return scan(
                **dict(zip(names, values, strict=True)),
                dt_softplus=True,
                mask=mask,
                backend=backend,
                **options,
            )

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@given(chunk=st.integers(1, 40), steps=st.integers(1, 60))
@settings(max_examples=15, deadline=None)
def test_chunk_size_never_changes_ssd(chunk: int, steps: int) -> None:
    inputs = ssd_inputs(1, steps, torch.float64)
    a = ssd_scan(**inputs, dt_softplus=True, chunk_size=chunk)
    b = ssd_scan(**inputs, dt_softplus=True, backend="reference")
    torch.testing.assert_close(a, b)


def test_fast_decay_neither_overflows_nor_loses_precision() -> None:
    inputs = ssd_inputs(1, 300, torch.float64)
    inputs["dt"] = inputs["dt"] + 8  # steps of size 8: within a chunk a_i spans hundreds
    inputs["A"] = -torch.tensor([0.01, 1.0, 16.0, 300.0]).double()
    exact = run(ssd_scan, inputs, backend="reference")
    ours = run(ssd_scan, {k: v.float() for k, v in inputs.items()}, backend="torch")
    assert_same(ours, exact, 2e-5)
    # a single chunk: what its last step writes swamps what is left of all others
    inputs = ssd_inputs(1, 64, torch.float64)
    inputs["dt"] = inputs["dt"] + 6
    inputs["A"] = -torch.tensor([1.0, 13.0, 60.0, 300.0]).double()
    exact = run(ssd_scan, inputs, backend="reference")
    assert_same(run(ssd_scan, {k: v.float() for k, v in inputs.items()}), exact, 1e-5)
    inputs6 = s6_inputs(1, 100, torch.float64)
    inputs6["dt"] = inputs6["dt"] + 8
    exact = run(s6_scan, inputs6, backend="reference")
    assert_same(run(s6_scan, {k: v.float() for k, v in inputs6.items()}), exact, 2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_stays_close_and_keeps_its_type(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 33, layer.in_proj.in_features)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert mixed.dtype == torch.bfloat16
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for y in (mixed, half):
        assert (y.float() - exact).norm() / exact.norm() < 0.03
    half.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in layer.parameters())


# -- published weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("case", "layer"), [("hydra", Hydra), ("mamba1", Mamba)])
def test_oracle(case: str, layer: type[nn.Module], backend: str) -> None:
    config = json.loads((HERE / "oracles" / f"{case}.json").read_text())["config"]
    tensors = load_file(HERE / "oracles" / f"{case}.safetensors")
    model = layer(**config, backend=backend)
    model.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    with torch.no_grad():
        assert (model(tensors["x"]) - tensors["y"]).abs().max() < 1e-5


@pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None or importlib.util.find_spec("triton") is None,
    reason="mamba-ssm and triton are not installed: its kernels and references are not compared",
)
def test_mamba_ssm_computes_the_same() -> None:
    """The real kernels, interpreted on the CPU, in a process of their own."""
    done = subprocess.run(
        [sys.executable, HERE / "ssm_interpreted.py"],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 29
    assert max(errors.values()) < 1e-5, {k: v for k, v in errors.items() if v >= 1e-5}


# -- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@given(left=st.integers(0, 9), right=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_padding_never_changes_a_valid_output(name: str, left: int, right: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = LAYERS[name]().double()
    width = layer.in_proj.in_features
    x = torch.randn(1, 11, width, dtype=torch.float64)
    garbage = torch.full((1, left + 11 + right, width), math.nan, dtype=torch.float64)
    garbage[:, left : left + 11] = x
    mask = torch.zeros(1, left + 11 + right, dtype=torch.bool)
    mask[:, left : left + 11] = True
    garbage.requires_grad_()
    y = layer(garbage, mask)
    torch.testing.assert_close(y[:, left : left + 11], layer(x))
    assert (y[~mask] == 0).all()
    y.square().sum().backward()
    assert (garbage.grad[~mask] == 0).all()
    if name != "hydra" and left == 0:
        _, padded = layer.forward_with_state(garbage, mask)
        _, plain = layer.forward_with_state(x)
        torch.testing.assert_close(padded, plain)


def test_biased_projections_do_not_wake_the_padding() -> None:
    torch.manual_seed(0)
    for layer in (
        Mamba(8, bias=True),
        Mamba2(8, headdim=8, bias=True),
        Hydra(8, headdim=8, bias=True),
    ):
        x = torch.randn(1, 12, 8)
        mask = torch.arange(12)[None] < 7
        y = layer(x, mask)
        torch.testing.assert_close(y[:, :7], layer(x[:, :7]))
        assert (y[:, 7:] == 0).all()


def test_the_published_leak_can_be_reproduced() -> None:
    torch.manual_seed(0)
    layer, leaky = Hydra(8, headdim=8), Hydra(8, headdim=8, leak_padding=True)
    leaky.load_state_dict(layer.state_dict())
    mask = torch.arange(12)[None] < 7
    x = torch.randn(1, 12, 8)
    zeroed = x * mask[:, :, None]
    # the published layer has no mask: it simply runs over the zeroed padding
    torch.testing.assert_close(leaky(x, mask), layer(zeroed))
    assert (leaky(x, mask)[:, :7] - layer(x, mask)[:, :7]).abs().max() > 1e-4
    # forwards the leak comes after every valid step
    one_way, leaky_way = Mamba(8), Mamba(8, leak_padding=True)
    leaky_way.load_state_dict(one_way.state_dict())
    torch.testing.assert_close(leaky_way(x, mask)[:, :7], one_way(x, mask)[:, :7])


# -- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@given(cuts=st.lists(st.integers(1, 24), min_size=1, max_size=4, unique=True))
@settings(max_examples=12, deadline=None)
def test_pieces_give_the_same_as_the_whole(name: str, cuts: list[int]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(2, 25, layer.in_proj.in_features, dtype=torch.float64)
    whole, end = layer.forward_with_state(x)
    state: MambaState | None = None
    pieces = []
    for piece in x.tensor_split(sorted(cuts), 1):
        y, state = layer.forward_with_state(piece, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, end)


# -- memory --------------------------------------------------------------------------------------


def saved_numbers(scan, inputs: dict[str, Tensor], **options) -> int:
    """How many numbers autograd keeps for the backward pass, beyond the inputs themselves."""
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    known = {v.data_ptr() for v in leaves.values()}
    saved: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        if v.data_ptr() not in known:
            saved[v.data_ptr()] = v.untyped_storage().size() // v.element_size()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        scan(**leaves, **options)
    return sum(saved.values())


def test_s6_keeps_no_length_by_state_tensor() -> None:
    width, n = 64, 16

    def inputs(steps: int) -> dict[str, Tensor]:
        x = torch.randn(1, steps, width)
        B = torch.randn(1, steps, n)
        return {"x": x, "dt": x.clone(), "A": -torch.ones(width, n), "B": B, "C": B.clone()}

    short, long = (saved_numbers(s6_scan, inputs(t), dt_softplus=True) for t in (4096, 16384))
    assert long <= 16384 * width * n / 16
    assert long <= 4.1 * short


def test_ssd_keeps_memory_linear_in_length() -> None:
    def inputs(steps: int) -> dict[str, Tensor]:
        x = torch.randn(1, steps, 2, 16)
        B = torch.randn(1, steps, 1, 16)
        dt = torch.rand(1, steps, 2)
        return {"x": x, "dt": dt, "A": -torch.ones(2), "B": B, "C": B.clone()}

    short, long = (saved_numbers(ssd_scan, inputs(t)) for t in (4096, 16384))
    assert long <= 4.1 * short
    assert long <= 2 * 16384 * 2 * 16


def test_a_million_steps() -> None:
    steps = 1_000_000
    x = torch.ones(1, steps, 1, 1)
    one = torch.ones(1, steps, 1, 1)
    with torch.no_grad():
        y, state = ssd_scan(x, one[..., 0], torch.full((1,), -1e-6), one, one, chunk_size=256)
    exact = (1 - math.exp(-1e-6 * steps)) / (1 - math.exp(-1e-6))
    assert y[0, -1, 0, 0].item() == pytest.approx(exact, rel=1e-3)
    assert state.item() == pytest.approx(exact, rel=1e-3)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "dt_bias", "initial_state"])
def test_wrong_shapes_are_named(name: str) -> None:
    for scan, inputs in (
        (s6_scan, s6_inputs(2, 6, torch.float32)),
        (ssd_scan, ssd_inputs(2, 6, torch.float32)),
    ):
        inputs[name] = inputs[name][:-1]
        with pytest.raises(DataError, match=f"{name}.*expected.*found"):
            scan(**inputs)


def test_bad_arguments_are_refused() -> None:
    inputs = ssd_inputs(2, 6, torch.float32)
    with pytest.raises(DataError, match="mask: expected bool"):
        ssd_scan(**inputs, mask=torch.ones(2, 6))
    with pytest.raises(DataError, match="chunk_size"):
        ssd_scan(**inputs, chunk_size=0)
    with pytest.raises(DataError, match="T >= 1"):
        ssd_scan(**{**inputs, "x": inputs["x"][:, :0]})
    with pytest.raises(DataError, match="groups that divide 4 heads"):
        ssd_scan(**{**inputs, "B": torch.ones(2, 6, 3, 5), "C": torch.ones(2, 6, 3, 5)})
    with pytest.raises(ConfigurationError, match="'cuda'"):
        ssd_scan(**inputs, backend="cuda")
    with pytest.raises(ConfigurationError, match="need a GPU"):
        ssd_scan(**inputs, backend="mamba_ssm")
    with pytest.raises(ConfigurationError, match="initial state"):
        s6_scan(**s6_inputs(2, 6, torch.float32), backend="mamba_ssm")
    with pytest.raises(ConfigurationError, match="headdim"):
        Mamba2(16, headdim=7)
    with pytest.raises(ConfigurationError, match="odd"):
        Hydra(16, headdim=8, d_conv=4)
    with pytest.raises(ConfigurationError, match="dt_min"):
        Mamba(16, dt_min=0.1, dt_max=0.01)
    for make in LAYERS.values():
        layer = make()
        with pytest.raises(DataError, match="expected x"):
            layer(torch.zeros(1, 4, 3))
        with pytest.raises(DataError, match="mask"):
            layer(torch.zeros(1, 4, layer.in_proj.in_features), torch.ones(1, 5).bool())


# -- on a GPU ------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    "scan", [pytest.param(s6_scan, marks=gpu), pytest.param(ssd_scan, marks=gpu)]
)
def test_gpu_paths_agree(scan) -> None:
    inputs = (s6_inputs if scan is s6_scan else ssd_inputs)(2, 300, torch.float32)
    mask = torch.arange(300, device="cuda") < torch.tensor([[300], [200]], device="cuda")
    exact = run(scan, inputs, mask=mask.cpu(), backend="reference")
    on_gpu = {k: v.cuda() for k, v in inputs.items()}
    fast = run(scan, on_gpu, mask=mask, backend="torch")
    assert_same(fast, exact, 1e-4)


@pytest.mark.parametrize(
    "scan", [pytest.param(s6_scan, marks=gpu), pytest.param(ssd_scan, marks=gpu)]
)
def test_compiled_kernels_agree(scan) -> None:
    kernel = kernels.selective_scan() if scan is s6_scan else kernels.chunk_scan()
    g = torch.Generator().manual_seed(0)
    b, t, n = 2, 300, 16
    if scan is s6_scan:
        inputs = {
            "x": torch.randn(b, t, 32, generator=g),
            "dt": torch.randn(b, t, 32, generator=g),
            "A": -torch.rand(32, n, generator=g) - 0.1,
            "B": torch.randn(b, t, n, generator=g),
            "C": torch.randn(b, t, n, generator=g),
        }
    else:
        inputs = {
            "x": torch.randn(b, t, 4, 16, generator=g),
            "dt": torch.randn(b, t, 4, generator=g),
            "A": -torch.rand(4, generator=g) - 0.1,
            "B": torch.randn(b, t, 1, n, generator=g),
            "C": torch.randn(b, t, 1, n, generator=g),
        }
    exact = run(scan, inputs, backend="reference")
    on_gpu = {k: v.cuda() for k, v in inputs.items()}
    assert_same(run(scan, on_gpu, backend="auto"), exact, 5e-3)  # the kernels use TF32
    if kernel.call is None:  # the pure Triton wheel has none for S6: `auto` falls back
        with pytest.raises(ConfigurationError, match="cannot be imported"):
            run(scan, on_gpu, backend="mamba_ssm")
        pytest.skip(kernel.reason)
    assert_same(run(scan, on_gpu, backend="mamba_ssm"), exact, 5e-3)


@pytest.mark.parametrize("name", [pytest.param(k, marks=gpu) for k in LAYERS])
def test_layers_agree_on_the_gpu(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 70, layer.in_proj.in_features)
    mask = torch.arange(70) < torch.tensor([[70], [40]])
    with torch.no_grad():
        exact = layer(x, mask)
        layer.cuda()
        y = layer(x.cuda(), mask.cuda()).cpu()
    assert (y - exact).abs().max() < 5e-3
