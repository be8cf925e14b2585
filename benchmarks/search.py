"""What a question costs against the size of the library.

    python benchmarks/search.py --out benchmarks/results/search_cpu.json

A library of `--videos` random videos is indexed for real (a MamFusion of a given space, 384 wide)
and then replicated in memory: the sketch, which every question reads whole, and the frame vectors
are copied; whole segments, which only the shortlist reads, are shared by the copies. Measured are
the retrieval of an encoded question (sketch and shortlist, then re-ranking by fusion) and, at the
first size, the exact scores of all segments without a sketch, encoding the question, and `search`
end to end with the zero-shot window in the best ten videos. `--words` encodes with
all-MiniLM-L6-v2. `--cpu-time` counts the time of the processor instead of the clock's: with one
thread it is what the clock would show on an idle machine, however busy this one is.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tvg_lib import paths
from tvg_lib.data.dataset import Video
from tvg_lib.encoders.sentence import MiniLM
from tvg_lib.models.mamfusion import EncodedQueries, MamFusion, MamFusionConfig
from tvg_lib.moments import QVHIGHLIGHTS_2S
from tvg_lib.results import environment
from tvg_lib.retrieval.data import RetrievalView
from tvg_lib.search import Retriever, VideoIndex

CLIPS, DIM = 75, 384


class RandomWords:
    """Word vectors of the right shape for any question."""

    name = "random"
    dim = DIM

    def encode(self, sentences: list[str]) -> np.ndarray:
        """(N, C) unit vectors."""
        vectors = np.random.default_rng(0).standard_normal((len(sentences), DIM))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def encode_tokens(self, sentences: list[str]) -> list[np.ndarray]:
        """N arrays (12, C)."""
        return [np.repeat(self.encode([s]), 12, axis=0) for s in sentences]


def median_ms(
    run: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median milliseconds of a call; two calls before warm up."""
    times = []
    for _ in range(rounds + 2):
        started = clock()
        run()
        times.append(1e3 * (clock() - started))
    return statistics.median(times[2:])


class Replicated(VideoIndex):
    """An index that pretends to hold its videos `copies` times."""

    def replicate(self, copies: int) -> None:
        """Copy what every question reads whole."""
        self._load()
        self._videos = self._videos * copies
        self._sketch = self._sketch.repeat(1, copies, 1)
        self._vectors = self._vectors.repeat(copies, 1)


def build(folder: str, videos: int, words: object) -> Replicated:
    """Index random videos whose clips drift, so that neighbouring clips are alike."""
    torch.manual_seed(0)
    config = MamFusionConfig(
        video_dim=DIM,
        text_dim=DIM,
        channels=64,
        heads=4,
        max_words=64,
        max_frames=40,
        given_space=True,
    )
    model = MamFusion(config).eval()
    for parameter in model.corrections.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    index = Replicated.create(folder, Retriever(model, RetrievalView(32, 40, 64), words))
    rng = np.random.default_rng(1)

    def clips() -> np.ndarray:
        steps = rng.standard_normal((CLIPS, DIM)).astype(np.float32)
        steps[1:] *= 0.4
        return np.cumsum(steps, axis=0)

    names = (f"video-{number}" for number in range(videos))
    index.add(((Video(n, 150.0, QVHIGHLIGHTS_2S), clips()) for n in names), total=videos)
    return index


def main() -> None:
    """Measure every size and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=1529)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4, 16, 66])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--words", action="store_true", help="encode a real question, end to end")
    parser.add_argument("--threads", type=int, help="of torch; its own choice where not given")
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        index = build(folder, arguments.videos, MiniLM() if arguments.words else RandomWords())
        queries: EncodedQueries = index.retriever.encode_question("a man in red feeds a dog")[0]
        unit = F.normalize(queries.vector, dim=-1)[0]
        for copies in arguments.copies:
            index.replicate(copies)

            def retrieve(rerank: int) -> Callable[[], object]:
                return lambda: index.retrieve(queries, rerank=rerank)

            row = {
                "videos": len(index),
                "hours": sum(video.duration for video in index.videos) / 3600,
                "memory_mib": index._sketch.nbytes / 2**20 + index._vectors.nbytes / 2**20,
                "retrieve_ms": median_ms(
                    lambda: index.retrieve(queries, rerank=0), arguments.rounds, clock
                ),
                "rerank_ms": median_ms(retrieve(20), arguments.rounds, clock),
            }
            if copies == 1:
                segments = index._rows("segments", torch.arange(len(index)))
                flat = F.normalize(segments, dim=-1).flatten(0, 1)
                row["exact_ms"] = median_ms(
                    lambda: torch.mv(flat, unit).view(-1, 32).amax(1).topk(128),  # noqa: B023
                    arguments.rounds,
                    clock,
                )
                row["question_ms"] = median_ms(
                    lambda: index.retriever.encode_question("a man in red feeds a dog"),
                    arguments.rounds,
                    clock,
                )
                row["search_ms"] = median_ms(
                    lambda: index.search("a man in red feeds a dog", top=10),
                    arguments.rounds,
                    clock,
                )
            rows.append({"load": os.getloadavg()[0]} | row)
            print({k: round(v, 2) for k, v in rows[-1].items()}, flush=True)
    record = {
        "words": arguments.words,
        "clock": clock.__name__,
        "environment": environment(),
        "rows": rows,
    }
    paths.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
