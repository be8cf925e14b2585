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

`--faiss 66` measures FAISS (`pip install faiss-cpu`; passed over where it is not installed) on the
same segments, up to 66 copies: a search of the 512 nearest segments in inverted lists of 8-bit
codes, about 4 sqrt(N) lists, of which 16, 64 or 256 are read. Training its lists takes minutes at
100,000 videos and is not counted. FAISS ranks segments, so the second branch's score and the re-
ranking would come on top. "Found" is the share of the 20 best videos of an exact search that are
among the first 20: for FAISS the videos of the best segments, for the index those with the best
score of both branches. The 32 questions are random directions, near no video in particular: hard
for both.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
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

CLIPS, SEGMENTS, DIM = 75, 32, 384


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
    index = Replicated.create(folder, Retriever(model, RetrievalView(SEGMENTS, 40, 64), words))
    rng = np.random.default_rng(1)

    def clips() -> np.ndarray:
        steps = rng.standard_normal((CLIPS, DIM)).astype(np.float32)
        steps[1:] *= 0.4
        return np.cumsum(steps, axis=0)

    names = (f"video-{number}" for number in range(videos))
    index.add(((Video(n, 150.0, QVHIGHLIGHTS_2S), clips()) for n in names), total=videos)
    return index


def videos_of(segments: np.ndarray) -> list[int]:
    """The first 20 different videos of segments, best first."""
    return list(dict.fromkeys((segments // SEGMENTS).tolist()))[:20]


def measure_faiss(
    flat: torch.Tensor,
    unit: torch.Tensor,
    copies: int,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, object]:
    """Time of one question, and at one copy what is found, by exact search and inverted lists."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    own, question = flat.numpy(), unit[None].numpy()
    lists = int(4 * (copies * len(own)) ** 0.5)
    index = faiss.index_factory(DIM, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(own)  # the copies would add nothing new
    index.add(own)
    once = faiss.clone_index(index)
    for _ in range(copies - 1):  # as lists: assigning every copy anew would take an hour
        index.merge_from(faiss.clone_index(once), index.ntotal)
    row: dict[str, object] = {"faiss": faiss.__version__, "faiss_lists": lists}
    if copies == 1:
        plain, asked = faiss.IndexFlatIP(DIM), questions().numpy()
        plain.add(own)
        exact = plain.search(asked, 512)[1]
        row["faiss_exact_ms"] = median_ms(lambda: plain.search(question, 512), rounds, clock)
    for read in (16, 64, 256):
        index.nprobe = read
        row[f"faiss_{read}_ms"] = median_ms(lambda: index.search(question, 512), rounds, clock)
        if copies == 1:
            listed = index.search(asked, 512)[1]
            row[f"faiss_{read}_found"] = found(map(videos_of, exact), map(videos_of, listed))
    return row


def questions() -> torch.Tensor:
    """(32, D) random unit vectors."""
    return F.normalize(torch.randn(32, DIM, generator=torch.Generator().manual_seed(2)), dim=-1)


def found(expected: Iterable[list[int]], listed: Iterable[list[int]]) -> float:
    """Share of the expected videos that are listed."""
    pairs = list(zip(expected, listed, strict=True))
    return sum(len(set(a) & set(b)) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def best_segments(flat: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    """(V,) score of the best segment of each video, exactly."""
    return torch.mv(flat, question).view(-1, SEGMENTS).amax(1)


def found_by_sketch(index: VideoIndex, flat: torch.Tensor, queries: EncodedQueries) -> float:
    """Share of the 20 videos with the best exact scores that the index has among its first 20."""
    exact, retrieved = [], []
    for question in questions():
        scores = index.retriever.model.combined(
            best_segments(flat, question), index._vectors @ question
        )
        exact.append(scores.topk(20).indices.tolist())
        asked = replace(queries, vector=question[None])
        retrieved.append(index.retrieve(asked, rerank=0)[1][:20].tolist())
    return found(exact, retrieved)


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
    parser.add_argument("--faiss", type=int, default=0, help="up to so many copies, beside FAISS")
    arguments = parser.parse_args()
    if arguments.faiss and importlib.util.find_spec("faiss") is None:
        print("FAISS is not installed: only the index is measured", flush=True)
        arguments.faiss = 0
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        index = build(folder, arguments.videos, MiniLM() if arguments.words else RandomWords())
        queries: EncodedQueries = index.retriever.encode_question("a man in red feeds a dog")[0]
        unit = F.normalize(queries.vector, dim=-1)[0]
        segments = index._rows("segments", torch.arange(len(index)))
        flat = F.normalize(segments, dim=-1).flatten(0, 1)
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
                row["found"] = found_by_sketch(index, flat, queries)
                row["exact_ms"] = median_ms(
                    lambda: best_segments(flat, unit).topk(128),
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
            if copies <= arguments.faiss:
                row |= measure_faiss(flat, unit, copies, arguments.rounds, clock)
            rows.append({"load": os.getloadavg()[0]} | row)
            print(rows[-1], flush=True)
    record = {
        "words": arguments.words,
        "clock": clock.__name__,
        "environment": environment(),
        "rows": rows,
    }
    paths.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
