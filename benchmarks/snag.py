"""SnAG against the length of the video: time and peak memory of a training step and of inference.

    python benchmarks/snag.py --out benchmarks/results/snag_cpu.json
    python benchmarks/snag.py --device cuda --out benchmarks/results/snag_cuda.json

The released TACoS configuration, one video, four queries of twelve words, float32 (bfloat16
autocast with `--bf16`). Every length and mode runs in a process of its own, so that a peak is that
of its own run: on a CPU the growth of the resident set over the loaded model and its inputs, on a
GPU what the allocator handed out.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.decoding import DecodingConfig, decode, point_moments
from tvg_lib.losses.detection import DetectionObjective
from tvg_lib.models.snag import TACOS, SnAG
from tvg_lib.moments import TACOS_C3D
from tvg_lib.nn.points import PointGrid
from tvg_lib.results import environment

MODES = ("training", "inference")
WORDS = 12


def random_batch(clips: int, queries: int) -> GroundingBatch:
    """One video of random features and `queries` queries, each about a tenth of it."""
    starts = torch.linspace(0, 0.85, queries)[:, None] * clips
    return GroundingBatch(
        video=torch.randn(1, clips, TACOS.video_dim),
        video_mask=torch.ones(1, clips, dtype=torch.bool),
        text=torch.randn(queries, WORDS, TACOS.text_dim),
        text_mask=torch.ones(queries, WORDS, dtype=torch.bool),
        query_video=torch.zeros(queries, dtype=torch.long),
        moments=torch.stack([starts, starts + 0.1 * clips], dim=-1),
        moment_mask=torch.ones(queries, 1, dtype=torch.bool),
        video_ids=("video",),
        query_ids=tuple(f"q{n}" for n in range(queries)),
        grids=(TACOS_C3D,),
        durations=(clips * TACOS_C3D.step,),
    )


def resident() -> float:
    """The highest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def once(mode: str, clips: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Measure one mode at one length in this process."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = SnAG(TACOS).to(device).train(mode == "training")
    objective = DetectionObjective().to(device)
    batch = random_batch(clips, arguments.queries).to(device)
    on_gpu = device.type == "cuda"

    def precision() -> torch.autocast | nullcontext:
        return torch.autocast(device.type, torch.bfloat16) if arguments.bf16 else nullcontext()

    def run() -> None:
        if mode == "training":
            with precision():
                output = model(batch)
            objective(output, batch)["total"].backward()
            model.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode(), precision():
                decode(
                    *point_moments(model(batch), PointGrid(), DecodingConfig()), DecodingConfig()
                )
        if on_gpu:
            torch.cuda.synchronize()

    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else resident()
    seconds = []
    for _ in range(arguments.rounds + 1):  # the first warms up
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    after = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident()
    return {
        "mode": mode,
        "clips": clips,
        "queries": arguments.queries,
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "first": seconds[0],
        "peak_mib": after - before,
        "loaded_mib": before,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Start a process per mode and length, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; its own choice where not given")
    parser.add_argument(
        "--clips", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)  # one measurement
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.mode:
        print(json.dumps(once(arguments.mode, arguments.clips[0], arguments)))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    rows = []
    for mode in MODES:
        for clips in arguments.clips:
            command = [sys.executable, __file__, "--mode", mode, "--clips", str(clips)]
            command += ["--device", arguments.device, "--queries", str(arguments.queries)]
            command += ["--rounds", str(arguments.rounds)] + ["--bf16"] * arguments.bf16
            if arguments.threads:
                command += ["--threads", str(arguments.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:  # most likely out of memory: say so and go on
                why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
                rows.append({"mode": mode, "clips": clips, "failed": why})
                print(f"{mode} {clips} clips: failed: {why}", flush=True)
                continue
            rows.append(json.loads(done.stdout))
            print(
                f"{mode} {clips} clips: {rows[-1]['seconds']:.3f} s, "
                f"{rows[-1]['peak_mib']:.0f} MiB over the loaded model",
                flush=True,
            )
    record = {
        "configuration": "TACOS",
        "precision": "bf16 autocast" if arguments.bf16 else "float32",
        "device": arguments.device,
        "environment": environment(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, arguments.out)


if __name__ == "__main__":
    main()
