"""How long a point grounder takes, and how much memory, against the length of the video.

The scripts `snag.py` and `hieramamba.py` name a model; what is measured is here. One video of
random features, queries of 20 to 48 words, float32 (bfloat16 autocast with `--bf16`). The modes:

    training    forward, released losses and backward, with dropout; gradients are thrown away
    detection   the same without the contrastive losses, where the model is trained by such
    inference   everything from features to ranked moments
    encoding    the video alone, once for all queries
    question    one query of a video that is encoded already, from its words to ranked moments

Every length and mode runs in a process of its own, so that a peak is that of its own run: on a CPU
the growth of the resident set over the loaded model and its inputs, on a GPU what the allocator
handed out. The fit says with which power of the length the time grows.
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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tvg_lib import paths
from tvg_lib.data.batching import GroundingBatch
from tvg_lib.decoding import DecodingConfig, decode, point_moments
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.moments import TACOS_C3D
from tvg_lib.nn.points import PointGrid
from tvg_lib.nn.pyramid import PointPredictions
from tvg_lib.results import environment

READING = ("inference", "encoding", "question")  # modes without losses
SHORTEST, LONGEST = 20, 48  # words of a query


def random_batch(clips: int, queries: int, video_dim: int, text_dim: int) -> GroundingBatch:
    """One video of random features and `queries` queries, each about a tenth of it."""
    starts = torch.linspace(0, 0.85, queries)[:, None] * clips
    words = torch.linspace(SHORTEST, LONGEST, queries).round().long()
    return GroundingBatch(
        video=torch.randn(1, clips, video_dim),
        video_mask=torch.ones(1, clips, dtype=torch.bool),
        text=torch.randn(queries, LONGEST, text_dim),
        text_mask=torch.arange(LONGEST) < words[:, None],
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


def ranked(output: PointPredictions) -> tuple[Tensor, Tensor]:
    """Moments and scores of the queries, best first."""
    return decode(*point_moments(output, PointGrid(), DecodingConfig()), DecodingConfig())


def training(
    model: PointGrounder,
    objective: nn.Module,
    batch: GroundingBatch,
    precision: AbstractContextManager,
) -> None:
    """A step without an optimiser."""
    with precision:
        loss = objective(model(batch), batch)["total"]
    loss.backward()
    model.zero_grad(set_to_none=True)
    objective.zero_grad(set_to_none=True)


def reading(
    mode: str, model: PointGrounder, batch: GroundingBatch, precision: AbstractContextManager
) -> Callable[[], object]:
    """What one of `READING` repeats."""

    @torch.inference_mode()
    def inference() -> object:
        with precision:
            return ranked(model(batch))

    @torch.inference_mode()
    def encoding() -> object:
        with precision:
            return model.encode_video(batch.video, batch.video_mask)

    if mode != "question":
        return inference if mode == "inference" else encoding
    encoded = encoding()

    @torch.inference_mode()
    def question() -> object:
        with precision:
            words = model.encode_text(batch.text, batch.text_mask)
            return ranked(model.predict(encoded, words, batch.query_video))

    return question


def once(
    mode: str,
    clips: int,
    build: Callable[[], PointGrounder],
    objectives: Mapping[str, Callable[[], nn.Module]],
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Measure one mode at one length in this process."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = build().to(device).train(mode in objectives)
    queries = 1 if mode == "question" else arguments.queries
    widths = model.config.video_dim, model.config.text_dim
    batch = random_batch(clips, queries, *widths).to(device)
    on_gpu = device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16) if arguments.bf16 else nullcontext()
    if mode in objectives:
        objective = objectives[mode]().to(device).train()
        run = partial(training, model, objective, batch, autocast)
    else:
        run = reading(mode, model, batch, autocast)
    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else resident()
    seconds = []
    for _ in range(arguments.rounds + 1):  # the first warms up
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    after = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident()
    return {
        "mode": mode,
        "clips": clips,
        "queries": queries,
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "first": seconds[0],
        "peak_mib": after - before,
        "loaded_mib": before,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gemm_gflops": multiplication_rate(device),
    }


def multiplication_rate(device: torch.device) -> float:
    """10^9 operations a second of a float32 matrix product, the fastest of five."""
    size = 2048
    a = torch.randn(size, size, device=device)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - start) / 1e9)
    return max(rates)


def exponents(rows: list[dict]) -> dict[str, float]:
    """Per mode, the p of the straight line log(seconds) = p log(clips) + c through its rows."""
    fitted = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = [
            (math.log(row["clips"]), math.log(row["fastest"]))
            for row in rows
            if row["mode"] == mode and "fastest" in row
        ]
        if len({x for x, _ in points}) > 1:
            fitted[mode] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return fitted


def main(
    script: str,
    configuration: str,
    build: Callable[[], PointGrounder],
    objectives: Mapping[str, Callable[[], nn.Module]],
) -> None:
    """Start a process per mode and length, and write the JSON file.

    Args:
        script: the file that calls this, started again for every measurement.
        configuration: its name in the record.
        build: makes the model; its `config` gives the widths of the features.
        objectives: makes the losses of each mode that trains.
    """
    modes = [*objectives, *READING]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; its own choice where not given")
    parser.add_argument("--modes", choices=modes, nargs="+", default=modes)
    parser.add_argument("--clips", type=int, nargs="+", default=[2304])
    parser.add_argument("--append", action="store_true", help="to the rows that the record has")
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)  # one measurement
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.single:
        print(
            json.dumps(once(arguments.modes[0], arguments.clips[0], build, objectives, arguments))
        )
        return
    if arguments.out is None:
        parser.error("--out is needed")
    rows = []
    if arguments.append and arguments.out.exists():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in rows if row["mode"] in modes]
    for mode in arguments.modes:
        for clips in arguments.clips:
            command = [sys.executable, script, "--single", "--modes", mode, "--clips", str(clips)]
            command += ["--device", arguments.device, "--queries", str(arguments.queries)]
            command += ["--rounds", str(arguments.rounds)] + ["--bf16"] * arguments.bf16
            if arguments.threads:
                command += ["--threads", str(arguments.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            rows = [row for row in rows if (row["mode"], row["clips"]) != (mode, clips)]
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
    rows.sort(key=lambda row: (modes.index(row["mode"]), row["clips"]))
    record = {
        "configuration": configuration,
        "precision": "bf16 autocast" if arguments.bf16 else "float32",
        "device": arguments.device,
        "exponents": exponents(rows),
        "environment": environment(),
        "rows": rows,
    }
    paths.write_text(arguments.out, json.dumps(record, indent=1) + "\n")
