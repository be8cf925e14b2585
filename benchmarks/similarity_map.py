"""A2FA + F2SGD: the large convolution two ways, a training step, one query, and an hour of video.

    python benchmarks/similarity_map.py --out benchmarks/results/similarity_map_cpu.json
    python benchmarks/similarity_map.py --device cuda --out somewhere.json

The paper's sizes: maps of 75 x 75 cells (150 s), kernel 21, batches of 128 queries, features of 384
channels. Every case runs in a process of its own, so that a peak of memory is its own: on a CPU the
growth of the resident set over what was loaded, on a GPU what the allocator handed out. "epoch" is
the time of one training step times the steps of an epoch over 1,550 queries.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tvg_lib import paths
from tvg_lib.data.batching import GroundingBatch
from tvg_lib.losses.cells import CellObjective
from tvg_lib.models.a2fa import A2FA, A2FAConfig
from tvg_lib.models.aligned_grounder import AlignedGrounder
from tvg_lib.models.alignment import Alignment
from tvg_lib.models.f2sgd import F2SGD, F2SGDConfig
from tvg_lib.moments import QVHIGHLIGHTS_2S
from tvg_lib.nn.square import fourier_convolution
from tvg_lib.results import environment

CLIPS, WIDTH, QUERIES = 75, 384, 1550
Run = Callable[[], object]


def random_batch(queries: int, clips: int) -> GroundingBatch:
    """One video and one moment per query."""
    ends = (torch.rand(queries, 1, 2) * (clips - 1)).sort(-1).values
    mask = torch.ones(queries, clips, dtype=torch.bool)
    return GroundingBatch(
        video=torch.randn(queries, clips, WIDTH),
        video_mask=mask,
        text=torch.randn(queries, 12, WIDTH),
        text_mask=mask[:, :12],
        query_video=torch.arange(queries),
        moments=ends,
        moment_mask=mask[:, :1],
        video_ids=tuple(f"v{n}" for n in range(queries)),
        query_ids=tuple(f"q{n}" for n in range(queries)),
        grids=(QVHIGHLIGHTS_2S,) * queries,
        durations=(2.0 * clips,) * queries,
        sentence=torch.randn(queries, WIDTH),
    )


def convolution(way: Callable, channels: int, backward: bool) -> Callable[[str], Run]:
    """32 maps through one layer of `channels` in and out."""

    def prepare(device: str) -> Run:
        x = torch.randn(32, channels, CLIPS, CLIPS, device=device, requires_grad=True)
        w = torch.randn(channels, channels, 21, 21, device=device, requires_grad=True)

        def run() -> None:
            y = way(x, w)
            if backward:
                torch.autograd.grad(y.sum(), (x, w))

        return run

    return prepare


def direct(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """PyTorch's own convolution."""
    return F.conv2d(x, w, padding=w.shape[-1] // 2)


def grounder(channels: int) -> AlignedGrounder:
    """A2FA + F2SGD at the paper's sizes."""
    return AlignedGrounder(A2FA(A2FAConfig(WIDTH)), F2SGD(F2SGDConfig(21, channels)))


def step(channels: int) -> Callable[[str], Run]:
    """One training step over 128 queries."""

    def prepare(device: str) -> Run:
        model, objective = grounder(channels).to(device).train(), CellObjective()
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
        batch = random_batch(128, CLIPS).to(device)

        def run() -> None:
            optimiser.zero_grad()
            objective(model(batch), batch)["total"].backward()
            optimiser.step()

        return run

    return prepare


def query(channels: int) -> Callable[[str], Run]:
    """One query against a 150-s video whose clips are encoded: alignment, map, ten moments."""

    def prepare(device: str) -> Run:
        model = grounder(channels).to(device).eval()
        batch = random_batch(1, CLIPS).to(device)

        def run() -> None:
            with torch.inference_mode():
                model(batch).ranked(10)

        return run

    return prepare


def long(clips: int, band: int | None) -> Callable[[str], Run]:
    """F2SGD over one long video, dense or in a band."""

    def prepare(device: str) -> Run:
        detector = F2SGD(F2SGDConfig(21, 8, band=band)).to(device).eval()
        mask = torch.ones(1, clips, dtype=torch.bool, device=device)
        x = Alignment(
            torch.randn(1, clips, WIDTH, device=device), mask, torch.randn(1, clips, device=device)
        )

        def run() -> None:
            with torch.inference_mode():
                detector(x).ranked(10)

        return run

    return prepare


CASES: dict[str, Callable[[str], Run]] = {
    "convolution 8, direct": convolution(direct, 8, False),
    "convolution 8, Fourier": convolution(fourier_convolution, 8, False),
    "convolution 8 with backward, direct": convolution(direct, 8, True),
    "convolution 8 with backward, Fourier": convolution(fourier_convolution, 8, True),
    "convolution 16, direct": convolution(direct, 16, False),
    "convolution 16, Fourier": convolution(fourier_convolution, 16, False),
    "training step, 8 channels": step(8),
    "training step, 16 channels": step(16),
    "one query, 8 channels": query(8),
    "one query, 16 channels": query(16),
    "600 clips, dense": long(600, None),
    "600 clips, band of 128": long(600, 128),
    "1800 clips, dense": long(1800, None),
    "1800 clips, band of 128": long(1800, 128),
    "5400 clips, band of 128": long(5400, 128),
}


def resident() -> float:
    """The highest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def once(name: str, device: str, rounds: int) -> dict[str, object]:
    """Measure one case in this process."""
    torch.manual_seed(0)
    run = CASES[name](device)
    on_gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else resident()
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 20 and len(seconds) > 1:
            break
    after = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident()
    row: dict[str, object] = {
        "case": name,
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "rounds": len(seconds) - 1,
        "peak_mib": after - before,
        "load": os.getloadavg()[0],
    }
    if name.startswith("training step"):
        row["epoch"] = statistics.median(seconds[1:]) * math.ceil(QUERIES / 128)
    return row


def main() -> None:
    """Start a process per case and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; its own choice where not given")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)  # one measurement
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps(once(arguments.case, arguments.device, arguments.rounds)))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    rows = []
    for case in arguments.cases:
        command = [sys.executable, __file__, "--case", case, "--device", arguments.device]
        command += ["--rounds", str(arguments.rounds)]
        if arguments.threads:
            command += ["--threads", str(arguments.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # most likely out of memory: say so and go on
            why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            rows.append({"case": case, "failed": why})
            print(f"{case}: failed: {why}", flush=True)
            continue
        rows.append(json.loads(done.stdout))
        print(f"{case}: {rows[-1]['seconds']:.4f} s, {rows[-1]['peak_mib']:.0f} MiB", flush=True)
    record = {
        "maps": f"{CLIPS} x {CLIPS}, kernel 21",
        "device": arguments.device,
        "threads": arguments.threads or torch.get_num_threads(),
        "environment": environment(),
        "rows": rows,
    }
    paths.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
