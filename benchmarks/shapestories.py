"""How fast ShapeStories is drawn, made and learnt.

    python benchmarks/shapestories.py --out benchmarks/results/shapestories_cpu.json --train

Drawing: pictures a second of short films, script to array, in one process and in `--jobs` side by
side. Making: seconds from nothing to the features of the `cpu` scale's films of every length, as
`tvg_lib.shapestories.dataset` makes them (scripts, questions, pictures, encoder, files), in a cache
that is thrown away. Learning (`--train`): seconds of the tiny dual encoder's whole recipe, and how
often the best clip of the new encoder and of the shipped one lies inside an answer, for questions
of validation films that one clip can answer. The aims on two cores: 3,000 pictures a second, five
minutes for the films and about as many for the encoder.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tvg_lib import paths
from tvg_lib.encoders.tiny import TinyDualEncoder
from tvg_lib.results import environment
from tvg_lib.shapestories.audit import best_clip_inside
from tvg_lib.shapestories.dataset import FILMS, LENGTHS, benchmark, level_of, load
from tvg_lib.shapestories.encoder import EncoderRecipe, tiny_dual_encoder, train_encoder
from tvg_lib.shapestories.generator import SHORT, write_script
from tvg_lib.shapestories.render import frames

ONE_CLIP = ("action", "activity", "scene")


def draw(number: int, rate: int = 24) -> tuple[int, float]:
    """Pictures of one film at `rate` a second, and the seconds that drawing them took."""
    script = write_script(SHORT, "val", number)
    started = time.perf_counter()
    pictures = sum(1 for _ in frames(script, rate))
    return pictures, time.perf_counter() - started


def drawing(films: int, jobs: int) -> dict[str, float]:
    """Pictures a second: of one process alone, and of `jobs` together."""
    draw(0)
    alone = [draw(number) for number in range(films)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(draw, range(jobs)))  # processes have started
        started = time.perf_counter()
        together = list(pool.map(draw, range(films * jobs)))
        seconds = time.perf_counter() - started
    return {
        "films": films,
        "jobs": jobs,
        "one process": sum(n for n, _ in alone) / sum(s for _, s in alone),
        "all": sum(n for n, _ in together) / seconds,
    }


def making(scale: str) -> dict[str, float]:
    """Seconds to make all films of a scale, by length, with as many processes as threads."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TVG_CACHE"] = folder
        for name in LENGTHS:
            started = time.perf_counter()
            benchmark(name, scale)
            seconds[name] = time.perf_counter() - started
            print(f"{name}: {seconds[name]:.0f} s", flush=True)
        del os.environ["TVG_CACHE"]
    return seconds | {"all": sum(seconds.values())}


def right(encoder: TinyDualEncoder, films: int) -> float:
    """How often (%) the best clip lies inside an answer, of questions that one clip can answer."""
    data = load(SHORT, "val", films, encoder=encoder)
    return 100 * float(
        best_clip_inside(data, [q for q in data.queries if level_of(q) in ONE_CLIP]).mean()
    )


def learning(films: int) -> dict[str, float]:
    """Seconds of the encoder's training, and its quality beside the shipped one's."""
    recipe = EncoderRecipe()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = train_encoder(recipe, Path(folder) / "run")
        seconds = time.perf_counter() - started
        os.environ["TVG_CACHE"] = folder
        quality = {
            "best clip inside, trained again": right(result.model, films),
            "best clip inside, shipped": right(tiny_dual_encoder(), films),
        }
        del os.environ["TVG_CACHE"]
    return {"seconds": seconds, "films": films, **quality}


def main() -> None:
    """Measure and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", default="cpu", choices=sorted(FILMS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--films", type=int, default=10, help="drawn by each process")
    parser.add_argument("--train", action="store_true", help="train the encoder, too")
    parser.add_argument("--judged", type=int, default=60, help="films on which it is judged")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.jobs)
    record = {
        "environment": environment(),
        "load": os.getloadavg(),
        "pictures a second": drawing(arguments.films, arguments.jobs),
    }
    print(record["pictures a second"], flush=True)
    record["seconds to make"] = {
        "scale": arguments.scale,
        **making(arguments.scale),
    }
    if arguments.train:
        record["encoder"] = learning(arguments.judged)
        print(record["encoder"], flush=True)
    paths.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
