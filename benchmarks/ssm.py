"""State-space layers: time beside other implementations, and time and memory against length.

    python benchmarks/ssm.py scans --out benchmarks/results/ssm_scans_cpu.json
    python benchmarks/ssm.py layers --out benchmarks/results/ssm_layers_cpu.json
    python benchmarks/ssm.py scaling --out benchmarks/results/ssm_scaling_cpu.json
    python benchmarks/ssm.py scans --device cuda --out benchmarks/results/ssm_scans_cuda.json
    python benchmarks/ssm.py plot benchmarks/results/ssm_*_cpu.json --out figures/ssm_benchmark.png

`scans` and `layers` take turns (ours, theirs, ours, theirs, ...) within one process and report
medians, so a busy machine slows all alike; the load is recorded. Before timing, every contender's
output is compared with ours on the same weights. A contender whose package is missing is recorded
as such. Contenders: transformers' Mamba and Mamba-2 layers, mambapy, mamba-ssm's PyTorch references
and, on a GPU, its kernels called directly; with `--compiled`, ours through torch.compile (on a CPU
it needs a C++ compiler).
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tvg_lib.ssm import Hydra, Mamba, Mamba2, kernels, s6_scan, ssd_scan

Contenders = dict[str, Callable[[], Tensor]]


def package(name: str) -> Any:
    """Import a module of an optional package; mamba-ssm's CUDA extension may be absent."""
    if name.startswith("mamba_ssm"):
        kernels.chunk_scan()  # imports mamba-ssm whether or not it was built with its extension
    return importlib.import_module(name)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.processor()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


# -- contenders ----------------------------------------------------------------------------------


def ssd_scans(steps: int, device: str) -> tuple[Contenders, list[Tensor], dict[str, str]]:
    """(1, steps, 8 heads x 64, state 64): the scan alone."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, steps, 8, 64, generator=g)
    dt = torch.nn.functional.softplus(torch.randn(1, steps, 8, generator=g) - 4)
    A = -torch.arange(1.0, 9.0)
    B = torch.randn(1, steps, 1, 64, generator=g) / 8
    C = torch.randn(1, steps, 1, 64, generator=g) / 8
    x, dt, A, B, C = leaves = [v.to(device).requires_grad_() for v in (x, dt, A, B, C)]
    ways: Contenders = {"ours": lambda: ssd_scan(x, dt, A, B, C, backend="torch")[0]}
    missing = {}
    try:
        combined = package("mamba_ssm.ops.triton.ssd_combined")
        minimal = package("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete
        ways["mamba-ssm reference"] = lambda: combined.ssd_chunk_scan_combined_ref(
            x, dt, A, B, C, 64
        )
        if steps % 64 == 0:
            ways["mamba-ssm minimal"] = lambda: minimal(
                x * dt[..., None], dt * A, B.expand(-1, -1, 8, -1), C.expand(-1, -1, 8, -1), 64
            )[0]
        if device == "cuda":
            ways["ours, mamba-ssm kernel"] = lambda: ssd_scan(x, dt, A, B, C, backend="mamba_ssm")[
                0
            ]
            ways["mamba-ssm kernel"] = lambda: combined.mamba_chunk_scan_combined(
                x, dt, A, B, C, 256, return_final_states=True
            )[0]
    except ImportError as error:
        missing["mamba-ssm"] = str(error)
    return ways, leaves, missing


def s6_scans(batch: int, device: str) -> tuple[Contenders, list[Tensor], dict[str, str]]:
    """(batch videos x 256 steps, 768 channels, state 16): the scan alone."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 256, 768, generator=g)
    dt = torch.nn.functional.softplus(torch.randn(batch, 256, 768, generator=g) - 4)
    A = -torch.arange(1.0, 17.0).repeat(768, 1)
    B, C = torch.randn(2, batch, 256, 16, generator=g).unbind()
    x, dt, A, B, C = leaves = [v.to(device).requires_grad_() for v in (x, dt, A, B, C)]
    ways: Contenders = {"ours": lambda: s6_scan(x, dt, A, B, C, backend="torch")[0]}
    missing = {}
    turned = [v.transpose(1, 2) for v in (x, dt, B, C)]
    try:
        theirs = package("mamba_ssm.ops.selective_scan_interface")
        ways["mamba-ssm reference"] = lambda: theirs.selective_scan_ref(
            turned[0], turned[1], A, turned[2], turned[3]
        ).transpose(1, 2)
        if device == "cuda" and kernels.selective_scan().call is not None:
            ways["ours, mamba-ssm kernel"] = lambda: s6_scan(x, dt, A, B, C, backend="mamba_ssm")[0]
            ways["mamba-ssm kernel"] = lambda: theirs.selective_scan_fn(
                turned[0], turned[1], A, turned[2], turned[3]
            ).transpose(1, 2)
    except ImportError as error:
        missing["mamba-ssm"] = str(error)
    try:
        pscan = package("mambapy.pscan").pscan

        def mambapy() -> Tensor:
            decay = torch.exp(dt.unsqueeze(3) * A)
            write = (dt * x).unsqueeze(3) * B.unsqueeze(2)
            return (pscan(decay, write) @ C.unsqueeze(3)).squeeze(3)

        ways["mambapy"] = mambapy
    except ImportError as error:
        missing["mambapy"] = str(error)
    return ways, leaves, missing


def with_weights(theirs: nn.Module, ours: nn.Module, device: str) -> nn.Module:
    """`theirs` with our weights; the names are the published ones on both sides."""
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(device)


def mamba2_layers(steps: int, device: str) -> tuple[Contenders, list[Tensor], dict[str, str]]:
    """A Mamba-2 layer of width 256 (8 heads x 64, state 64) on one sequence; Hydra beside it."""
    torch.manual_seed(0)
    ours = Mamba2(256, d_state=64, headdim=64)
    x = torch.randn(1, steps, 256).to(device).requires_grad_()
    ways: Contenders = {}
    missing = {}
    try:
        from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=256, num_heads=8, head_dim=64, state_size=64, n_groups=1, use_bias=False
        )
        theirs = with_weights(Mamba2Mixer(config, 0), ours, device)
        ways["transformers"] = lambda: theirs(x)
    except ImportError as error:
        missing["transformers"] = str(error)
    ours.to(device)
    torch.manual_seed(0)
    hydra = Hydra(256, d_state=64, headdim=64).to(device)
    ways = {"ours": lambda: ours(x), **ways, "ours, Hydra": lambda: hydra(x)}
    return ways, [x, *ours.parameters()], missing


def mamba_layers(batch: int, device: str) -> tuple[Contenders, list[Tensor], dict[str, str]]:
    """A Mamba-1 layer of width 384 (768 inner channels, state 16) on `batch` videos x 256 steps."""
    torch.manual_seed(0)
    ours = Mamba(384)
    x = torch.randn(batch, 256, 384).to(device).requires_grad_()
    ways: Contenders = {}
    missing = {}
    try:
        from transformers.models.mamba.configuration_mamba import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        for name, use in (("transformers", False), ("transformers with mambapy", True)):
            if use and importlib.util.find_spec("mambapy") is None:
                missing[name] = "without mambapy, transformers falls back to its own loop"
                continue
            config = MambaConfig(hidden_size=384, state_size=16, use_mambapy=use)
            mixer = with_weights(MambaMixer(config, 0), ours, device)
            ways[name] = lambda mixer=mixer: mixer(x)
    except ImportError as error:
        missing["transformers"] = str(error)
    try:
        their = package("mambapy.mamba")
        block = with_weights(
            their.MambaBlock(their.MambaConfig(d_model=384, n_layers=1)), ours, device
        )
        ways["mambapy"] = lambda: block(x)
    except ImportError as error:
        missing["mambapy"] = str(error)
    ours.to(device)
    return {"ours": lambda: ours(x), **ways}, [x, *ours.parameters()], missing


# -- timing --------------------------------------------------------------------------------------


def once(
    way: Callable[[], Tensor], leaves: list[Tensor] | None, device: str
) -> tuple[float, float]:
    """Seconds of wall clock and of processor time for one run, backward too where `leaves`."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    with nullcontext() if leaves else torch.no_grad():
        y = way()
    if leaves:
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def check(ways: Contenders) -> dict[str, float]:
    """Largest difference of every contender from ours, relative to the largest output."""
    with torch.no_grad():
        first = ways["ours"]()
        scale = first.abs().max()
        return {
            name: ((way() - first).abs().max() / scale).item()
            for name, way in ways.items()
            if name not in ("ours", "ours, Hydra")
        }


def take_turns(
    ways: Contenders, leaves: list[Tensor] | None, rounds: int, device: str
) -> dict[str, dict[str, float]]:
    """Median seconds of each contender over interleaved rounds, and the ratio to ours."""
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            wall, cpu = once(way, leaves, device)
            if turn:
                walls[name].append(wall)
                cpus[name].append(cpu)
    ours, ours_cpu = statistics.median(walls["ours"]), statistics.median(cpus["ours"])
    return {
        name: {
            "seconds": statistics.median(walls[name]),
            "fastest": min(walls[name]),
            "processor_seconds": statistics.median(cpus[name]),
            "times_ours": statistics.median(walls[name]) / ours,
            "processor_times_ours": statistics.median(cpus[name]) / ours_cpu,
        }
        for name in ways
    }


def compare(
    what: str, device: str, rounds: int, lengths: Iterable[int], videos: int, compiled: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All comparisons of scans, or of layers, one by one."""
    if what == "scans":
        makers = [
            (f"SSD scan, 1 x {t} x 8 x 64, state 64", lambda t=t: ssd_scans(t, device))
            for t in lengths
        ]
        s6 = [(f"S6 scan, {videos} x 256 x 768, state 16", lambda: s6_scans(videos, device))]
    else:
        if device == "cpu":  # transformers would call mamba-ssm's kernels, which need a GPU
            sys.modules["mamba_ssm"] = None  # type: ignore[assignment]
        makers = [
            (f"Mamba-2 layer, 1 x {t} x 256", lambda t=t: mamba2_layers(t, device)) for t in lengths
        ]
        s6 = [(f"Mamba-1 layer, {videos} x 256 x 384", lambda: mamba_layers(videos, device))]
    for name, make in makers + (s6 if videos else []):
        ways, leaves, missing = make()
        if compiled:
            ways["ours, torch.compile"] = torch.compile(ways["ours"])
        case: dict[str, Any] = {"difference_from_ours": check(ways), "missing": missing}
        for mode, wanted in (("forward", None), ("forward + backward", leaves)):
            for slow in ("transformers", "mamba-ssm reference"):
                if wanted and name.startswith(("Mamba-1", "S6")) and ways.pop(slow, None):
                    missing[slow] = "forward only: its step-by-step loop takes minutes backwards"
            case[mode] = take_turns(ways, wanted, rounds, device)
            if "mamba-ssm kernel" in ways:  # what it costs to call it through us: at most 3 %
                through = case[mode]["ours, mamba-ssm kernel"]["seconds"]
                overhead = through / case[mode]["mamba-ssm kernel"]["seconds"] - 1
                case[f"overhead over mamba-ssm itself, {mode}"] = overhead
                print(f"{name:40} {mode:18} overhead over mamba-ssm itself {overhead:+.1%}")
            case[f"load, {mode}"] = os.getloadavg()[0]
            for way, row in case[mode].items():
                print(
                    f"{name:40} {mode:18} {way:26} {1e3 * row['seconds']:9.1f} ms "
                    f"{row['times_ours']:6.2f} x ours (processor time "
                    f"{row['processor_times_ours']:.2f} x)",
                    flush=True,
                )
        yield name, case


# -- scaling -------------------------------------------------------------------------------------


class Peak:
    """Peak memory since the last reset, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> None:
        """Forget the past peak and remember what is in use now."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory hides the growth
            Path("/proc/self/clear_refs").write_text("5")
            self.base = self._status("VmRSS")

    def read(self) -> int:
        """Bytes above the reset."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.base
        return self._status("VmHWM") - self.base

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise OSError(f"/proc/self/status holds no {key}")


def scaling_ways(steps: int, device: str) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Small scans (so that a million steps fit) and attention of the same width."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device).requires_grad_()

    x, B, C = normal(1, steps, 1, 64), normal(1, steps, 1, 16), normal(1, steps, 1, 16)
    dt, wide = normal(1, steps, 1), normal(1, steps, 64)
    A, A6 = -torch.ones(1, device=device), -torch.ones(64, 16, device=device)
    ways: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "SSD": (lambda: ssd_scan(x, dt, A, B, C, dt_softplus=True)[0], [x, dt, B, C]),
        "S6": (
            lambda: s6_scan(x[:, :, 0], wide, A6, B[:, :, 0], C[:, :, 0], dt_softplus=True)[0],
            [x, wide, B, C],
        ),
    }
    if steps <= 16384:
        q = normal(1, 1, steps, 64)
        ways["attention"] = (
            lambda: torch.softmax(q @ q.transpose(2, 3) / 8, 3) @ q,
            [q],
        )
    return ways


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(length), least squares."""
    xs = torch.tensor(lengths, dtype=torch.float64).log()
    ys = torch.tensor(values, dtype=torch.float64).log()
    xs, ys = xs - xs.mean(), ys - ys.mean()
    return ((xs * ys).sum() / (xs * xs).sum()).item()


def scaling(device: str, rounds: int, lengths: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time and peak memory against length, forward and with backward, with fitted exponents."""
    peak = Peak(device)
    rows: dict[str, dict[str, Any]] = {}
    for steps in lengths:
        for name in scaling_ways(1, device):
            for mode in ("forward", "forward + backward"):
                ways = scaling_ways(steps, device)
                if name not in ways or (name == "attention" and mode != "forward"):
                    continue
                way, leaves = ways[name]
                wanted = leaves if mode != "forward" else None
                once(way, wanted, device)
                peak.reset()
                times = [once(way, wanted, device) for _ in range(rounds)]
                row = rows.setdefault(
                    f"{name}, {mode}",
                    {"lengths": [], "seconds": [], "processor_seconds": [], "peak_bytes": []},
                )
                row["lengths"].append(steps)
                row["seconds"].append(statistics.median(w for w, _ in times))
                row["processor_seconds"].append(statistics.median(c for _, c in times))
                row["peak_bytes"].append(peak.read())
                print(name, mode, steps, {k: v[-1] for k, v in row.items()}, flush=True)
    for name, row in rows.items():
        row["exponent_seconds"] = exponent(row["lengths"], row["seconds"])
        row["exponent_processor_seconds"] = exponent(row["lengths"], row["processor_seconds"])
        big = [(n, p) for n, p in zip(row["lengths"], row["peak_bytes"], strict=True) if n >= 16384]
        if len(big) > 1:  # below, buffers of fixed size and the allocator hide the growth
            row["exponent_peak_bytes"] = exponent([n for n, _ in big], [max(p, 1) for _, p in big])
        yield name, row


# -- picture -------------------------------------------------------------------------------------


def plot(files: list[Path], out: Path) -> None:
    """The figure of `tvg_lib.viz_ssm`, from records of one device."""
    import matplotlib

    matplotlib.use("Agg")
    from tvg_lib import viz, viz_ssm

    viz.use_house_style()
    out.parent.mkdir(parents=True, exist_ok=True)
    viz_ssm.draw_benchmark(viz_ssm.read_records(files)).savefig(out)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Benchmarks of the state-space layers.")
    parser.add_argument("what", choices=["scans", "layers", "scaling", "plot"])
    parser.add_argument("records", nargs="*", type=Path, help="records to plot")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="*", help="of SSD and Mamba-2; may be empty")
    parser.add_argument("--videos", type=int, default=64, help="of S6 and Mamba-1; 0 for none")
    parser.add_argument("--compiled", action="store_true", help="ours through torch.compile, too")
    parser.add_argument("--add", action="store_true", help="keep the cases that the file holds")
    options = parser.parse_args()
    if options.what == "plot":
        plot(options.records, options.out)
        return
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {"what": options.what, "commands": [], "cases": {}}
    if options.add and options.out.exists():
        record = json.loads(options.out.read_text())
    record["commands"].append(" ".join(sys.argv[1:]))
    record["machine"] = machine(options.device)
    cases: dict[str, Any] = record["cases"]
    if options.what == "scaling":
        lengths = options.lengths or [1024, 4096, 16384, 65536, 262144, 1048576]
        results = scaling(options.device, options.rounds, lengths)
    else:
        lengths = [3456, 16384, 65536] if options.lengths is None else options.lengths
        results = compare(
            options.what,
            options.device,
            options.rounds,
            lengths,
            options.videos,
            options.compiled,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    for name, case in results:  # written after each, so that an interrupted run leaves what it has
        cases[name] = case | {"rounds": options.rounds, "load_at_end": os.getloadavg()[0]}
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, options.out)


if __name__ == "__main__":
    main()
