"""From a question to a moment in a library of videos.

    index = VideoIndex.create(folder, retriever)      # or VideoIndex.open(folder, retriever)
    index.add_dataset(dataset)                        # resumable; progress bar
    index.search("a man feeds a dog", top=5)          # ranked (video, moment, score)

Three steps, each over fewer videos than the one before:

    1. all videos       products of the question with a *sketch* of every segment: its coordinates
                        in the `SKETCH` directions in which segments of the library differ most
    2. `shortlist`      the retriever's own score, from the whole segments; memory-mapped
    3. `top`            fusion over time (where the retriever has it), then a grounder for the
                        moment inside each video

**Files.** `index.json` names the shards and the basis of the sketch and is replaced last, so that a
reader, or a kill, finds the old index or the new one; what no index names any more, the next writer
sweeps away. Videos lie in *shards* of some hundred, one safetensors file each: half-precision
segments and clips, frame vectors, and in its header what videos they are of. A shard is written
once and never changed; videos are removed by writing their shard anew without them. Interrupted
building goes on at the first video that no shard holds. Shards are memory-mapped without holding
a file open, so a library may have any number of them; nothing is unpickled.

The sketch of a shard is a file of its own. Its basis is fitted to segments from all over the
library, and again whenever the library has grown by `REFIT`: what is added later may lie in other
directions than what came first.

An index belongs to its retriever: opening it with other weights, another view or another text
encoder is refused.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tvg_lib import inline, paths
from tvg_lib.baselines import ZeroShotWindow
from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.data.features import ArrayStore, check_id, check_sequence, read_array
from tvg_lib.decoding import Prediction
from tvg_lib.encoders.protocols import VideoEncoder
from tvg_lib.encoders.sentence import SentenceEncoder
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.fingerprint import value_fingerprint
from tvg_lib.metrics.retrieval import CorpusAnswer
from tvg_lib.models.mamfusion import EncodedQueries, EncodedVideos, MamFusion
from tvg_lib.moments import TimeGrid
from tvg_lib.retrieval.data import RetrievalView

FORMAT = "tvg-companion/video-index/2"
MANIFEST = "index.json"
SHARD = 256  # videos
TOGETHER = 32  # videos encoded at a time
SKETCH = 64  # directions
REFIT = 4  # times as many videos as the basis was fitted to
FITTED = 16  # shards, from all over the library, whose segments a basis is fitted to
FILMS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
OF_VIDEOS = ("segments", "hidden", "vectors")  # arrays of a shard with a row for every video

Finder = Callable[[GroundingDataset], list[Prediction]]


@dataclass(frozen=True)
class Retriever:
    """A retrieval model with all that it needs to read videos and questions.

    Attributes:
        model: in evaluation mode.
        view: how videos and queries are cut for it.
        words: what the queries of its training were encoded with.
        clips: name of what encoded the clips, checked against that of films that are added; None
            leaves it to the caller that features fit.
    """

    model: MamFusion
    view: RetrievalView
    words: SentenceEncoder
    clips: str | None = None

    def __post_init__(self) -> None:
        if self.words.dim != self.model.config.text_dim:
            raise ConfigurationError(
                f"the model reads words of width {self.model.config.text_dim}, "
                f"{self.words.name} gives {self.words.dim}"
            )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What an index must have been built with: architecture, weights, view, text encoder."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return {
            "architecture": value_fingerprint(asdict(self.model.config))[:16],
            "weights": digest.hexdigest()[:16],
            "view": asdict(self.view),
            "words": self.words.name,
            "clips": self.clips,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def encode_videos(self, clips: Sequence[np.ndarray]) -> EncodedVideos:
        """Encode (T, C) clip features of some videos."""
        return self.model.encode_video(*(x.to(self.device) for x in self.view.videos(clips)))

    @torch.inference_mode()
    def encode_question(self, text: str) -> tuple[EncodedQueries, np.ndarray, np.ndarray]:
        """Encode one question; also its (K, C) words and (1, D) sentence vector, for a grounder."""
        words = self.words.encode_tokens([text])[0]
        sentence = self.words.encode([text])
        features = torch.from_numpy(self.view.words(words))[None].to(self.device)
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=self.device)
        given = torch.from_numpy(np.asarray(sentence, np.float32)).to(self.device)
        return self.model.encode_text(features, mask, given), words, sentence


@dataclass(frozen=True)
class SearchResult:
    """One answer: a moment of a video.

    Attributes:
        video: where it is.
        start, end: seconds.
        score: of the answer: that of the video, lowered by the share that `moment_score` lacks of
            the best one that the grounder gave in this video.
        video_score: of the video, by the retriever.
        moment_score: of the moment, by the grounder.
    """

    video: Video
    start: float
    end: float
    score: float
    video_score: float
    moment_score: float

    def __repr__(self) -> str:
        when = inline.span(self.start, self.end, self.video.duration)
        return f"{self.score:.3f}  {self.video.id}  {when}"


@dataclass(frozen=True, repr=False)
class SearchResults:
    """Ranked answers to a question, best first.

    Attributes:
        text: the question.
        answers: best first.
        captions: of some videos, the text of each clip: shown under the answers.
    """

    text: str
    answers: tuple[SearchResult, ...]
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[SearchResult]:
        return iter(self.answers)

    def __getitem__(self, rank: int) -> SearchResult:
        return self.answers[rank]

    def corpus_answers(self) -> list[CorpusAnswer]:
        """The answers as `corpus_moment_report` takes them."""
        return [CorpusAnswer(a.video.id, a.start, a.end) for a in self.answers]

    def __repr__(self) -> str:
        rows = [f"{rank:2}  {answer!r}" for rank, answer in enumerate(self.answers, start=1)]
        return "\n".join([f"“{self.text}”", *rows])

    def _repr_html_(self) -> str:
        parts = [f"<div><b>“{escape(self.text)}”</b></div>"]
        for rank, answer in enumerate(self.answers, start=1):
            duration = answer.video.duration
            note = f"{inline.span(answer.start, answer.end, duration)} · {answer.score:.3f}"
            row = inline.Row(f"{rank}", [(answer.start, answer.end)], inline.ANSWER, note)
            parts.append(inline.bars([row], duration, answer.video.id))
            parts.append(self._caption(answer))
        return "".join(parts)

    def _caption(self, answer: SearchResult) -> str:
        """The caption of the clip in the middle of an answer, as HTML; empty without captions."""
        texts = self.captions.get(answer.video.id)
        if not texts:
            return ""
        middle = (answer.start + answer.end) / 2
        clip = min(max(round(answer.video.grid.to_index(middle)), 0), len(texts) - 1)
        return (
            '<div style="max-width:760px;font-size:12px;opacity:0.75;margin:0 0 8px 8em">'
            f"{escape(texts[clip])}</div>"
        )


@dataclass(frozen=True)
class _Shard:
    """Some videos, memory-mapped.

    Attributes:
        name: of its files.
        entries: id, length, recording, grid and number of clips of each video.
        arrays: those of `OF_VIDEOS`, and "clips" of all videos one after the other.
        ends: where the clips of each video start, and the end of the last.
    """

    name: str
    entries: list[dict[str, Any]]
    arrays: dict[str, Tensor]
    ends: np.ndarray

    @classmethod
    def open(cls, folder: Path, name: str) -> "_Shard":
        """Map a shard into memory.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                entries = json.loads(file.metadata()["videos"])
                arrays = {part: file.get_tensor(part) for part in (*OF_VIDEOS, "clips")}
            for entry in entries:
                _video(entry)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a shard of a video index: {error!r}") from error
        ends = np.cumsum([0] + [entry["clips"] for entry in entries])
        rows = {len(arrays[part]) for part in OF_VIDEOS}
        if rows != {len(entries)} or ends[-1] != len(arrays["clips"]):
            raise DataError(f"{path}: the arrays do not fit the {len(entries)} videos")
        return cls(name, entries, arrays, ends)

    def __len__(self) -> int:
        return len(self.entries)

    def sketch(self, basis: Tensor) -> np.ndarray:
        """(V, L, R) coordinates of the unit segments in the directions of a (D, R) basis."""
        return (F.normalize(self.arrays["segments"].float(), dim=-1) @ basis).numpy()

    def only(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Arrays and entries of some of its videos."""
        arrays = {part: self.arrays[part][list(rows)] for part in OF_VIDEOS}
        clips = [self.arrays["clips"][self.ends[i] : self.ends[i + 1]] for i in rows]
        return arrays | {"clips": torch.cat(clips)}, [self.entries[i] for i in rows]


class VideoIndex:
    """A library of videos on disk, ready to be searched. Made by `create` or `open`."""

    def __init__(self, folder: Path, retriever: Retriever, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.retriever = retriever
        self._manifest = manifest
        self._opened: dict[str, _Shard] = {}
        self._load()

    # --- making and opening -----------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path | str, retriever: Retriever) -> "VideoIndex":
        """A new, empty index; what an interrupted building has left there is opened.

        Raises:
            DataError: the folder holds the index of another retriever, or damaged files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not (folder / MANIFEST).exists():
                empty = {"format": FORMAT, "retriever": retriever.identity}
                empty |= {"basis": None, "fitted": 0, "shards": []}
                paths.write_text(folder / MANIFEST, json.dumps(empty))
        return cls.open(folder, retriever)

    @classmethod
    def open(cls, folder: Path | str, retriever: Retriever) -> "VideoIndex":
        """Open an index.

        Raises:
            DataError: there is none, it was built with another retriever (the message names what
                differs), or its files are damaged.
        """
        folder = Path(folder)
        while True:
            manifest = _read_manifest(folder, retriever)
            try:
                return cls(folder, retriever, manifest)
            except DataError:
                # A writer may have swept away what this manifest names: then there is a newer one.
                if _read_manifest(folder, retriever) == manifest:
                    raise

    def _load(self) -> None:
        """Map every shard, and hold what all videos are compared by in memory."""
        names = self._manifest["shards"]
        for name in [name for name in names if name not in self._opened]:
            self._opened[name] = _Shard.open(self.folder, name)
        self._shards = [self._opened[name] for name in names]
        self._opened = dict(zip(names, self._shards, strict=True))
        self._videos: list[Video] = []
        self._place: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self._shards):
            for row, entry in enumerate(shard.entries):
                video = _video(entry)
                if video.id in self._place:
                    raise DataError(f"{self.folder}: the video {video.id!r} occurs twice")
                self._place[video.id] = (number, row)
                self._videos.append(video)
        self._basis = self._sketch = self._vectors = None
        if not self._shards:
            return
        basis = self._manifest["basis"]
        self._basis = self._directions(basis)
        # Segment by segment, so that the maximum over segments runs along contiguous videos.
        length = self._shards[0].arrays["segments"].shape[1]
        self._sketch = torch.empty(length, len(self._videos), self._basis.shape[1])
        start = 0
        for shard in self._shards:
            path = self.folder / _sketch_file(shard.name, basis)
            sketch = torch.from_numpy(np.array(read_array(path)))
            part = self._sketch[:, start : start + len(shard)]
            if sketch.shape != part.transpose(0, 1).shape:
                raise DataError(f"{path}: expected {len(shard)} videos, found {list(sketch.shape)}")
            part.copy_(sketch.transpose(0, 1))
            start += len(shard)
        vectors = torch.cat([shard.arrays["vectors"] for shard in self._shards])
        self._vectors = F.normalize(vectors, dim=-1)

    def __len__(self) -> int:
        return len(self._videos)

    def __contains__(self, video_id: object) -> bool:
        return video_id in self._place

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos, in the order they were added."""
        return tuple(self._videos)

    def clips(self, video_id: str) -> np.ndarray:
        """(T, C) clip features of a video, as a grounder reads them.

        Raises:
            DataError: there is no such video.
        """
        if video_id not in self._place:
            raise DataError(f"{self.folder} has no video {video_id!r}")
        shard, row = self._place[video_id]
        first, last = self._shards[shard].ends[row : row + 2]
        clips = self._shards[shard].arrays["clips"][first:last].numpy()
        return check_sequence(clips, f"{self.folder}[{video_id!r}]", None)

    def __repr__(self) -> str:
        hours = sum(video.duration for video in self._videos) / 3600
        return f"VideoIndex({len(self)} videos, {hours:.1f} h)"

    # --- adding and removing ----------------------------------------------------------------------

    def add(
        self, videos: Iterable[tuple[Video, np.ndarray]], *, total: int | None = None
    ) -> "VideoIndex":
        """Add videos with their (T, C) clip features; those that are there already are passed over.

        Args:
            videos: read one after the other; features of one shard are held in memory.
            total: how many there are, for the progress bar.

        Raises:
            DataError: features that are no finite (T, C) array or do not fit their grid.
        """
        from tqdm.auto import tqdm

        with self._locked():
            waiting: dict[str, tuple[Video, np.ndarray]] = {}
            known = set(self._place)
            try:
                with tqdm(total=total, desc="index", unit="video") as bar:
                    for video, clips in videos:
                        if video.id not in known:
                            waiting[video.id] = (video, self._checked(video, clips))
                            known.add(video.id)
                        bar.update()
                        if len(waiting) == SHARD:
                            self._write(list(waiting.values()))
                            waiting = {}
                    if waiting:
                        self._write(list(waiting.values()))
            finally:
                self._load()  # what was written before a bad video stays
        return self

    def add_dataset(self, dataset: GroundingDataset) -> "VideoIndex":
        """Add all videos of a data set; features are read as they are needed."""
        missing = [video for key, video in dataset.videos.items() if key not in self]
        return self.add(((video, dataset.clips(video.id)) for video in missing), total=len(missing))

    def add_films(self, folder: Path | str, encoder: VideoEncoder) -> "VideoIndex":
        """Add the films of a folder by their file names, in alphabetical order.

        Args:
            folder: its sub-folders are not searched; files are films by their ending (`FILMS`).
            encoder: of the clips; what it computes is cached by the content of the film.

        Raises:
            ConfigurationError: the retriever was made for clips of another encoder.
            DataError: no films there, or one that cannot be read whole; shards before it stay.
        """
        from tvg_lib.encoders.video import cached_video

        if self.retriever.clips not in (None, encoder.name):
            raise ConfigurationError(
                f"the retriever reads clips of {self.retriever.clips!r}, found {encoder.name!r}"
            )
        folder = Path(folder)
        films = sorted(path for path in folder.glob("*") if path.suffix.lower() in FILMS)
        if not films:
            raise DataError(f"{folder}: expected films ({', '.join(FILMS)}), found none")
        missing = [path for path in films if path.name not in self]
        encoded = (cached_video(path, encoder) for path in missing)
        return self.add(((film.video, film.features) for film in encoded), total=len(missing))

    def remove(self, video_ids: Iterable[str]) -> "VideoIndex":
        """Remove videos; their shards are written anew without them.

        Raises:
            DataError: a video is not there; then none is removed.
        """
        gone = set(video_ids)
        unknown = sorted(gone - self._place.keys())
        if unknown:
            raise DataError(f"{self.folder} has no video {unknown[0]!r}")
        with self._locked():
            basis, kept, count = self._manifest["basis"], [], 0
            for shard in self._shards:
                keep = [row for row, e in enumerate(shard.entries) if e["id"] not in gone]
                count += len(keep)
                if len(keep) == len(shard):
                    kept.append(shard.name)
                elif keep:
                    copy = self._save_shard(*shard.only(keep))
                    self._save_sketch(copy, basis, self._basis)
                    kept.append(copy.name)
            # What was fitted to more videos than are left is fitted anew after less growth.
            fitted = min(self._manifest["fitted"], count)
            self._replace(shards=kept, fitted=fitted, basis=basis if kept else None)
            self._load()
        return self

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the folder, and with what another process may have written to it."""
        with _lock(self.folder):
            current = _read_manifest(self.folder, self.retriever)
            if current != self._manifest:
                self._manifest = current
                self._load()
            self._sweep()  # what a killed writer left
            yield
            self._sweep()

    def _checked(self, video: Video, clips: np.ndarray) -> np.ndarray:
        where = f"video {video.id!r}"
        clips = check_sequence(clips, where, self.retriever.model.config.video_dim)
        video.grid.check(len(clips), video.duration, where)
        return clips

    def _write(self, videos: Sequence[tuple[Video, np.ndarray]]) -> None:
        """Encode some videos and add them as a shard."""
        clips = [sequence for _, sequence in videos]
        encoded = EncodedVideos.joined(
            [
                self.retriever.encode_videos(clips[start : start + TOGETHER])
                for start in range(0, len(clips), TOGETHER)
            ]
        )
        arrays = {
            "segments": encoded.segments.cpu().half(),
            "hidden": encoded.hidden.cpu().half(),
            "vectors": encoded.vector.cpu(),
            "clips": torch.from_numpy(np.concatenate(clips)).half(),
        }
        if not all(torch.isfinite(array).all() for array in arrays.values()):
            raise DataError(f"{self.folder}: a value does not fit into half precision")
        entries = [_entry(video, len(sequence)) for video, sequence in videos]
        new = self._save_shard(arrays, entries)
        shards = [self._opened[name] for name in (*self._manifest["shards"], new.name)]
        count = sum(map(len, shards))
        basis, fitted = self._manifest["basis"], self._manifest["fitted"]
        if basis is None or count >= REFIT * fitted:
            (basis, directions), fitted, unsketched = self._save_basis(shards), count, shards
        else:
            directions, unsketched = self._directions(basis), [new]
        for shard in unsketched:
            self._save_sketch(shard, basis, directions)
        self._replace(basis=basis, fitted=fitted, shards=[shard.name for shard in shards])

    def _save_shard(
        self, arrays: Mapping[str, Tensor], entries: Sequence[Mapping[str, Any]]
    ) -> _Shard:
        name = f"shard-{uuid.uuid4().hex[:12]}"
        with paths.replacing(self.folder / f"{name}.safetensors") as temporary:
            save_file(dict(arrays), temporary, metadata={"videos": json.dumps(entries)})
        self._opened[name] = _Shard.open(self.folder, name)
        return self._opened[name]

    def _save_basis(self, shards: Sequence[_Shard]) -> tuple[str, Tensor]:
        """Fit the directions of the sketch to segments from all over the library."""
        some = np.unique(np.linspace(0, len(shards) - 1, FITTED).round().astype(int))
        rows = torch.cat([shards[i].arrays["segments"].flatten(0, 1).float() for i in some])
        directions = principal_directions(F.normalize(rows, dim=-1), SKETCH)
        name = f"basis-{uuid.uuid4().hex[:12]}"
        _save(self.folder / f"{name}.npy", directions.numpy())
        return name, directions

    def _directions(self, basis: str) -> Tensor:
        """(D, R) of a basis on disk."""
        return torch.from_numpy(np.array(read_array(self.folder / f"{basis}.npy")))

    def _save_sketch(self, shard: _Shard, basis: str, directions: Tensor) -> None:
        _save(self.folder / _sketch_file(shard.name, basis), shard.sketch(directions))

    def _replace(self, **changes: Any) -> None:
        manifest = self._manifest | changes
        paths.write_text(self.folder / MANIFEST, json.dumps(manifest))
        self._manifest = manifest

    def _sweep(self) -> None:
        """Delete what the manifest does not name."""
        basis, shards = self._manifest["basis"], self._manifest["shards"]
        named = {f"{basis}.npy", *(f"{name}.safetensors" for name in shards)}
        named |= {_sketch_file(name, basis) for name in shards}
        for kind in ("shard-*", "basis-*", ".part-*"):
            for path in self.folder.glob(kind):
                if path.name not in named:
                    path.unlink(missing_ok=True)

    # --- searching --------------------------------------------------------------------------------

    @torch.inference_mode()
    def retrieve(
        self, queries: EncodedQueries, shortlist: int = 100, rerank: int = 20
    ) -> tuple[Tensor, Tensor]:
        """The best videos for one encoded question.

        Args:
            queries: of length 1.
            shortlist: videos that survive the sketch and get the retriever's own score.
            rerank: the best of these that get the second score too, where the retriever has one.

        Returns:
            scores (N,), best first, and (N,) positions in `videos`; N = min(shortlist, videos).

        Raises:
            DataError: the index is empty.
        """
        if not self._videos:
            raise DataError(f"{self.folder}: the index is empty")
        model = self.retriever.model
        q = F.normalize(queries.vector, dim=-1)[0].cpu()
        frame = self._vectors @ q
        best = sketch_scores(self._sketch, self._basis.T @ q)
        rough = model.combined(best, frame)
        order = rough.topk(min(shortlist, len(rough))).indices
        segments = self._rows("segments", order)
        exact = model.combined((F.normalize(segments, dim=-1) @ q).amax(1), frame[order])
        ranked = exact.sort(descending=True)
        scores, order = ranked.values, order[ranked.indices]
        if rerank and model.config.reranks:
            head = order[:rerank]
            library = EncodedVideos(
                self._rows("hidden", head).to(self.retriever.device),
                segments[ranked.indices[:rerank]].to(self.retriever.device),
                torch.stack([self._vectors[i] for i in head]).to(self.retriever.device),
            )
            pairs = torch.arange(len(head), device=self.retriever.device)
            fused = model.fused_scores(queries, library, torch.zeros_like(pairs), pairs).cpu()
            again = model.reranked(scores[:rerank], fused).sort(descending=True)
            scores = torch.cat([again.values, scores[rerank:]])
            order = torch.cat([head[again.indices], order[rerank:]])
        return scores, order

    def _rows(self, name: str, positions: Tensor) -> Tensor:
        """Rows of an array of all shards, in float32."""
        places = np.array([self._place[self._videos[i].id] for i in positions.tolist()])
        stored = self._shards[0].arrays[name]
        found = stored.new_empty(len(places), *stored.shape[1:])
        for number in np.unique(places[:, 0]):
            inside = torch.from_numpy(places[:, 0] == number)
            rows = torch.from_numpy(places[inside.numpy(), 1])
            found[inside] = self._shards[number].arrays[name][rows]
        return found.float()

    def search(
        self,
        text: str,
        top: int = 10,
        finder: Finder | None = None,
        *,
        moments: int = 1,
        shortlist: int = 100,
        rerank: int = 20,
        captions: Mapping[str, Sequence[str]] | None = None,
    ) -> SearchResults:
        """The best moments of the library for a question.

        Args:
            text: the question.
            top: answers; of as many videos where `moments` is 1.
            finder: what finds the moment in a video: takes a data set with one query a video, named
                by the video, and gives a prediction of each, as `ZeroShotWindow().predict` (the
                default, where clips and sentences share a space) or `partial(ground, model)` of any
                point grounder.
            moments: answers that one video may give.
            shortlist, rerank: as in `retrieve`.
            captions: text of clips by video id, to be shown with the answers.

        Raises:
            DataError: the index is empty, or the text is, or a video got no prediction.
        """
        if not text.strip():
            raise DataError("a question has words, found an empty text")
        finder = ZeroShotWindow().predict if finder is None else finder
        queries, words, sentence = self.retriever.encode_question(text)
        scores, order = self.retrieve(queries, max(shortlist, top), rerank)
        chosen = [self._videos[i] for i in order[:top].tolist()]
        found = {p.query_id: p for p in finder(self._asked(text, chosen, words, sentence))}
        if unanswered := [video.id for video in chosen if video.id not in found]:
            raise DataError(f"the finder gave no prediction for video {unanswered[0]!r}")
        answers = [
            answer
            for video, score in zip(chosen, scores[:top].tolist(), strict=True)
            for answer in _answers(video, score, found[video.id], moments)
        ]
        answers.sort(key=lambda answer: -answer.score)
        return SearchResults(text, tuple(answers[:top]), dict(captions or {}))

    def _asked(
        self, text: str, videos: Sequence[Video], words: np.ndarray, sentence: np.ndarray
    ) -> GroundingDataset:
        """One query, asked of each of some videos."""
        nowhere = np.zeros((0, 2))
        return GroundingDataset(
            name="search",
            videos={video.id: video for video in videos},
            queries=tuple(Query(video.id, video.id, text, nowhere) for video in videos),
            video_features=ArrayStore.of({video.id: self.clips(video.id) for video in videos}),
            text_features=ArrayStore.of({video.id: words for video in videos}),
            sentence_features=ArrayStore.of({video.id: sentence for video in videos}),
        )


def _read_manifest(folder: Path, retriever: Retriever) -> dict[str, Any]:
    """The manifest of an index, checked to be whole and that of this retriever."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, expected {FORMAT!r}")
        built_with = dict(manifest["retriever"])
        for name in manifest["shards"]:
            check_id(name, str(path))
        if manifest["shards"] or manifest["basis"] is not None:
            check_id(manifest["basis"], str(path))
        if not isinstance(manifest["fitted"], int):
            raise ValueError(f"fitted to {manifest['fitted']!r} videos")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the manifest of a video index: {error!r}") from error
    for part, value in retriever.identity.items():
        if built_with.get(part) != value:
            raise DataError(
                f"{folder} was built with another retriever: {part} {built_with.get(part)!r}, "
                f"expected {value!r}"
            )
    return manifest


def _answers(
    video: Video, score: float, prediction: Prediction, moments: int
) -> Iterator[SearchResult]:
    found = list(prediction)[:moments]
    best = max((moment.score for moment in found), default=0.0)
    for moment in found:
        share = moment.score / best if best > 0 else 1.0
        # Not a product: a cosine below zero would rise with a smaller share.
        lowered = score - (1 - share) * abs(score)
        yield SearchResult(video, moment.start, moment.end, lowered, score, float(moment.score))


def sketch_scores(sketch: Tensor, question: Tensor) -> Tensor:
    """(V,) largest product of a question (R,) with the segments (L, V, R) of each video."""
    return torch.mv(sketch.view(-1, sketch.shape[-1]), question).view(sketch.shape[:2]).amax(0)


def principal_directions(rows: Tensor, count: int) -> Tensor:
    """(D, R) orthonormal directions in which (N, D) rows have most of their length.

    Not centred: products, not differences, are what a sketch keeps. R = min(count, D).
    """
    second_moment = rows.double().T @ rows.double() / len(rows)
    _, directions = torch.linalg.eigh(second_moment)
    return directions.flip(1)[:, :count].float().contiguous()


def _sketch_file(shard: str, basis: str | None) -> str:
    return f"{shard}.{basis}.npy"


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / ".index.lock")


def _save(path: Path, array: np.ndarray) -> None:
    with paths.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _entry(video: Video, clips: int) -> dict[str, Any]:
    return {
        "id": video.id,
        "duration": video.duration,
        "recording": video.recording,
        "grid": asdict(video.grid),
        "clips": clips,
    }


def _video(entry: Mapping[str, Any]) -> Video:
    return Video(entry["id"], entry["duration"], TimeGrid(**entry["grid"]), entry["recording"])
