"""QVH-captions: a real benchmark that runs on a laptop. (QVH-long: `tvg_lib.data.splicing`.)

QVHighlights (Lei et al. 2021) asks written questions about 150-second videos; its moments and
highlight scores are public for `val` and `test`. VTG-GPT (Xu et al. 2024) published a MiniGPT-v2
caption of every two-second clip of the same videos, and paraphrases of the queries. Captions and
queries, embedded by one sentence encoder, lie in one space: what CLIP gives the papers.

Protocol: train on `val` (hold some of its videos out for selection), report on `test`. The official
training split has no captions, so the papers' own figures are a reference, not the same experiment.

    file                 source at commit                                          licence
    {val,test}.jsonl     jayleicn/moment_detr b7e553a  data/highlight_*.jsonl      CC BY-NC-SA 4.0
    captions_{val,test}  YoucanBaby/VTG-GPT 9d66061    data/qvhighlights/caption/  MIT
    paraphrases_*.jsonl  YoucanBaby/VTG-GPT 9d66061    data/qvhighlights/query/    MIT

The files are never shipped. They are taken from `$TVG_DATA/qvhighlights`, or from the download
cache, which `download()` fills; `python -m tvg_lib.data.qvh_captions` downloads and embeds all.

A few videos last between 120 and 150 s, and a few have one caption more or one fewer than
duration / 2. Captions are kept as they are: the grid is never stretched to fit, so caption i always
describes the seconds [2 i, 2 i + 2), and the last seconds of such a video have no clip.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal, get_args
from urllib.parse import quote

import numpy as np

from tvg_lib import paths
from tvg_lib.data.dataset import GroundingDataset, Query
from tvg_lib.data.download import fetch
from tvg_lib.data.readers import join, read_qvhighlights
from tvg_lib.encoders.sentence import (
    Embedded,
    MiniLM,
    SentenceEncoder,
    cached_sentences,
    cached_tokens,
)
from tvg_lib.errors import DataError
from tvg_lib.json_fields import decode, json_lines, read_text
from tvg_lib.moments import QVHIGHLIGHTS_2S

Split = Literal["val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_GITHUB = "https://raw.githubusercontent.com"
_MOMENT_DETR = "jayleicn/moment_detr/b7e553a"
_VTG_GPT = "YoucanBaby/VTG-GPT/9d66061/data/qvhighlights"


@dataclass(frozen=True)
class Source:
    """A published file: its name here, its address below GitHub's raw host, its SHA-256."""

    name: str
    address: str
    sha256: str


SOURCES = (
    Source(
        "val.jsonl",
        f"{_MOMENT_DETR}/data/highlight_val_release.jsonl",
        "f668a1eaea156ec5315e14718999cea043a8cf948d3cafbd8e8d655318c3cd02",
    ),
    Source(
        "test.jsonl",
        f"{_MOMENT_DETR}/data/highlight_test_with_gt.jsonl",
        "bd50ec6bb5dd3f72571126ba5fdc7418efdd9219a9487984e483a02e2ce5d493",
    ),
    Source(
        "captions_val.zip",
        f"{_VTG_GPT}/caption/val.zip",
        "b5df1a0c518e4886778ce4087bfb04a22b073ba440dda96b919ef4417fa03d34",
    ),
    Source(
        "paraphrases_val.jsonl",
        f"{_VTG_GPT}/query/val.jsonl",
        "145bb6afdb20d76172e2ed19ab1235cf2b94d3492115ea18c4c0d2aea6f58468",
    ),
    Source(
        "paraphrases_test.jsonl",
        f"{_VTG_GPT}/query/test.jsonl",
        "d89f6359388a03677f1773b07f48dcc8a060145adaaf7dbd86e57ed246b2f37f",
    ),
)
# Published as one file a video: the checksum is `contents_sha256` of all of them.
TEST_CAPTIONS = Source(
    "captions_test",
    f"{_VTG_GPT}/caption/test",
    "1dd18f803bc217aa5e5bffe850c19fddb1ebf24aff39923ed223779c5d12e1a8",
)
DOWNLOADS_AT_ONCE = 8


def contents_sha256(files: Mapping[str, bytes]) -> str:
    """SHA-256 of a set of files by name and content, whatever archive or folder they came in."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        for piece in (name.encode(), data):
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
    return digest.hexdigest()


# --- where the files are --------------------------------------------------------------------------


def folder() -> Path:
    """Folder of the raw files: `$TVG_DATA/qvhighlights` where it exists, or the download cache."""
    placed = paths.data()
    if placed is not None and (placed / "qvhighlights").is_dir():
        return placed / "qvhighlights"
    return paths.cache() / "qvhighlights"


def available(split: Split, root: Path | None = None) -> bool:
    """Whether the raw files of a split are on this machine."""
    root = folder() if root is None else root
    return all(
        (root / name).exists() for name in (f"{split}.jsonl", f"paraphrases_{split}.jsonl")
    ) and any((root / f"captions_{split}{ending}").exists() for ending in (".zip", ""))


def download(root: Path | None = None, host: str = _GITHUB, pause: float = 1.0) -> Path:
    """Fetch all files of both splits, about 9 MB; what is there already is not fetched again.

    Args:
        root: folder to fill; by default `folder()`, where nothing is fetched if `TVG_DATA` has it.
        host: address that the published addresses are below.
        pause: seconds before a broken download is tried again.

    Returns:
        The folder.

    Raises:
        DataError: a file cannot be fetched or is not the published one. A later call goes on where
            this one stopped.
    """
    from tqdm.auto import tqdm

    if root is None:
        root = folder()
        if all(available(split, root) for split in SPLITS):
            return root
    root.mkdir(parents=True, exist_ok=True)
    with tqdm(SOURCES, desc="QVH-captions", unit="file") as bar:
        for source in bar:
            fetch(f"{host}/{source.address}", root / source.name, source.sha256, pause=pause)
    if not (root / "captions_test.zip").exists():
        _download_test_captions(root, host, pause)
    return root


def _download_test_captions(root: Path, host: str, pause: float) -> None:
    """One file a video into a folder that takes its name when all of them are there and right."""
    from tqdm.auto import tqdm

    target = root / TEST_CAPTIONS.name
    if target.exists():
        return
    parts = root / f"{TEST_CAPTIONS.name}.parts"
    names = sorted({f"{row['vid']}.jsonl" for row in _rows(root / "test.jsonl")})

    def get(name: str) -> None:
        address = f"{host}/{TEST_CAPTIONS.address}/{quote(name)}"
        fetch(address, parts / name, pause=pause)

    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        for _ in tqdm(pool.map(get, names), total=len(names), desc="test captions", unit="file"):
            pass
    found = contents_sha256({name: (parts / name).read_bytes() for name in names})
    if found != TEST_CAPTIONS.sha256:
        for name in names:
            (parts / name).unlink()
        raise DataError(
            f"{host}/{TEST_CAPTIONS.address}: expected contents with the SHA-256 "
            f"{TEST_CAPTIONS.sha256}, found {found}; nothing was kept"
        )
    os.replace(parts, target)


# --- reading --------------------------------------------------------------------------------------


def _require(path: Path) -> Path:
    if not path.exists():
        raise DataError(
            f"{path} does not exist: set TVG_DATA to a folder with qvhighlights/, or fetch the "
            "files with `python -m tvg_lib.data.qvh_captions`"
        )
    return path


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"QVH-captions has the splits {' and '.join(SPLITS)}, found {split!r}")


def _rows(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines file, in order."""
    return (row for _, row in json_lines(read_text(path), str(path)))


def _caption_files(root: Path, split: Split) -> dict[str, bytes]:
    """Caption files by name, from the zip or from a folder of the same name."""
    archive = root / f"captions_{split}.zip"
    if archive.exists():
        try:
            with zipfile.ZipFile(archive) as opened:
                return {
                    PurePosixPath(name).name: opened.read(name)
                    for name in opened.namelist()
                    if name.endswith(".jsonl")
                }
        except zipfile.BadZipFile as error:
            raise DataError(f"{archive}: not a readable zip file ({error})") from error
    unpacked = _require(root / f"captions_{split}")
    return {path.name: path.read_bytes() for path in sorted(unpacked.glob("*.jsonl"))}


def _captions_of(name: str, data: bytes) -> list[str]:
    """The captions of one video; they must be numbered 0, 1, 2, ..."""
    texts: dict[int, str] = {}
    for _, row in json_lines(decode(data, name), name):
        index, text = row.get("moment"), row.get("description")
        if not isinstance(index, int) or not isinstance(text, str) or not text.strip():
            raise DataError(
                f'{name}: expected {{"moment": i, "description": "..."}}, found {row!r}'
            )
        if index in texts:
            raise DataError(f"{name}: clip {index} has two captions")
        texts[index] = text.strip()
    if not texts or sorted(texts) != list(range(len(texts))):
        raise DataError(
            f"{name}: expected captions of the clips 0, 1, 2, ... without a gap, "
            f"found {len(texts)} captions up to clip {max(texts, default=-1)}"
        )
    return [texts[i] for i in range(len(texts))]


@lru_cache(maxsize=4)
def _read_captions(root: Path, split: Split) -> tuple[dict[str, list[str]], str]:
    """Captions by video id, and the hash of the files they came from."""
    files = _caption_files(root, split)
    texts = {
        name.removesuffix(".jsonl"): _captions_of(f"{root}/captions_{split}/{name}", data)
        for name, data in sorted(files.items())
    }
    return texts, contents_sha256(files)


def captions(split: Split, root: Path | None = None) -> Mapping[str, Sequence[str]]:
    """The captions of every video, by video id: caption i describes seconds [2 i, 2 i + 2).

    Raises:
        DataError: the files are missing or malformed.
    """
    _check_split(split)
    return _read_captions(folder() if root is None else root, split)[0]


def paraphrases(split: Split, root: Path | None = None) -> Mapping[str, Sequence[str]]:
    """Five paraphrases of every query, by query id.

    Raises:
        DataError: the file is missing or malformed.
    """
    _check_split(split)
    path = _require((folder() if root is None else root) / f"paraphrases_{split}.jsonl")
    found: dict[str, list[str]] = {}
    for row in _rows(path):
        texts = row.get("rephrased_query")
        if "qid" not in row or not isinstance(texts, list) or not all(texts):
            raise DataError(f"{path}: expected qid and rephrased_query, found {row!r}")
        found[str(row["qid"])] = [text.strip() for text in texts]
    return found


def dataset_fingerprint(split: Split, root: Path | None = None) -> str:
    """SHA-256 of a split's annotations, captions and paraphrases, for run records."""
    _check_split(split)
    root = folder() if root is None else root
    files = {
        name: _require(root / name).read_bytes()
        for name in (f"{split}.jsonl", f"paraphrases_{split}.jsonl")
    }
    files["captions"] = _read_captions(root, split)[1].encode()
    return contents_sha256(files)


# --- embedding ------------------------------------------------------------------------------------


class EmbeddedFeatures:
    """A feature store over cached embeddings: each id owns some rows of one memory-mapped array."""

    def __init__(self, embedded: Embedded, sentences: Mapping[str, Sequence[int]]) -> None:
        """
        Args:
            embedded: vectors of all sentences.
            sentences: by id, the sentences whose vectors, one after the other, are its features.
        """
        self._embedded = embedded
        starts, ends = embedded.offsets[:-1], embedded.offsets[1:]
        self._positions = {
            key: np.concatenate([np.arange(starts[i], ends[i]) for i in chosen])
            for key, chosen in sentences.items()
        }

    @property
    def dim(self) -> int:
        """Width C of every sequence."""
        return self._embedded.rows.shape[1]

    def __getitem__(self, key: str) -> np.ndarray:
        """(T, C) float32."""
        if key not in self._positions:
            raise DataError(f"no embedding of {key!r} among {len(self)} ids")
        return self._embedded.rows[self._positions[key]].astype(np.float32)

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


def _embeddings() -> Path:
    return paths.cache() / "embeddings"


def _numbered(sentences: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Different sentences in alphabetical order (the order the cache is made in), numbered."""
    unique = sorted(set(sentences))
    return unique, {sentence: i for i, sentence in enumerate(unique)}


def text_stores(
    queries: Sequence[Query], encoder: SentenceEncoder, label: str
) -> tuple[EmbeddedFeatures, EmbeddedFeatures]:
    """Word features and sentence vectors of queries, by query id; cached."""
    unique, number = _numbered([query.text.strip() for query in queries])
    chosen = {query.id: [number[query.text.strip()]] for query in queries}
    words = cached_tokens(encoder, unique, _embeddings(), f"{label}, words")
    whole = cached_sentences(encoder, unique, _embeddings(), f"{label}, sentences")
    return EmbeddedFeatures(words, chosen), EmbeddedFeatures(whole, chosen)


def load(
    split: Split,
    encoder: SentenceEncoder | None = None,
    root: Path | None = None,
    *,
    first: int | None = None,
) -> GroundingDataset:
    """QVH-captions as a data set; embeds what the cache does not hold (minutes, once).

    Clip features are the embeddings of the captions, text features those of the queries' word
    pieces, sentence features the queries' own vectors, in the space of the captions.

    Args:
        split: "val" (1,550 queries, 1,519 videos) or "test" (1,542 and 1,529).
        encoder: all-MiniLM-L6-v2 by default.
        root: folder of the raw files; `folder()` by default.
        first: only this many videos, in alphabetical order: a glimpse that is embedded in seconds.

    Raises:
        DataError: files are missing or malformed, or a video of a query has no captions.
    """
    _check_split(split)
    root = folder() if root is None else root
    encoder = MiniLM() if encoder is None else encoder
    name = f"qvh-captions/{split}" + ("" if first is None else f"-first{first}")
    annotations = read_qvhighlights(_require(root / f"{split}.jsonl"), name=name, strict=True)
    if first is not None:
        annotations = annotations.restrict(sorted(annotations.videos)[:first])
    texts = captions(split, root)
    missing = sorted(set(annotations.videos) - set(texts))
    if missing:
        raise DataError(
            f"{root}/captions_{split}: no captions of {len(missing)} videos, e.g. {missing[0]}"
        )
    for key, duration in annotations.videos.items():
        QVHIGHLIGHTS_2S.check(len(texts[key]), duration, f"captions of {key}")
    unique, number = _numbered([text for key in annotations.videos for text in texts[key]])
    embedded = cached_sentences(encoder, unique, _embeddings(), f"QVH-captions {split}: captions")
    clips = EmbeddedFeatures(
        embedded, {key: [number[text] for text in texts[key]] for key in annotations.videos}
    )
    words, whole = text_stores(annotations.queries, encoder, f"QVH-captions {split}: queries")
    return join(annotations, QVHIGHLIGHTS_2S, clips, words, whole)


def main() -> None:
    """Download what is missing and embed both splits."""
    download()
    for split in SPLITS:
        print(load(split))


if __name__ == "__main__":
    main()
