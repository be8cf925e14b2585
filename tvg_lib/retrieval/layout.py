"""MS-SL's data layout, in which the features of this task are published.

    <root>/<collection>/
      TextData/<collection><split>.caption.txt       one query a line: "video#enc#0 the sentence"
      TextData/roberta_<collection>_query_feat.hdf5  (K, C) words of a query, under its id
      FeatureData/<visual>/video2frames.txt          a Python literal: {video: [frame id, ...]}
      FeatureData/<visual>/shape.txt, id.txt         "rows width"; frame ids, separated by spaces
      FeatureData/<visual>/feature.bin               rows x width float32, in the order of id.txt

The layout has neither durations nor moments. Videos get a grid of one second a frame: retrieval
needs no more. Nothing of this is unpickled or evaluated: video2frames.txt is parsed as a literal.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.data.features import FeatureStore, HDF5Store, check_id, check_sequence
from tvg_lib.errors import DataError
from tvg_lib.moments import TimeGrid

FRAMES = TimeGrid(clip_size=1, stride=1, fps=1)


class FrameStore:
    """Video features from one flat file of frame vectors, memory-mapped.

    Args:
        folder: holds feature.bin, id.txt, shape.txt and video2frames.txt.

    Raises:
        DataError: a file is missing, or they do not fit together.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        shape = self._read("shape.txt").split()
        if len(shape) != 2 or not all(part.isdigit() and int(part) for part in shape):
            raise DataError(f"{self.folder / 'shape.txt'}: expected 'rows width', found {shape}")
        rows, self._dim = map(int, shape)
        ids = self._read("id.txt").split()
        if len(ids) != rows:
            raise DataError(f"{self.folder / 'id.txt'}: expected {rows} ids, found {len(ids)}")
        self._row = {frame: i for i, frame in enumerate(ids)}
        if len(self._row) != rows:
            raise DataError(f"{self.folder / 'id.txt'}: a frame id occurs twice")
        path = self.folder / "feature.bin"
        found = path.stat().st_size if path.is_file() else 0
        if found != rows * self._dim * 4:
            raise DataError(
                f"{path}: expected {rows} x {self._dim} float32 ({rows * self._dim * 4} bytes), "
                f"found {found} bytes"
            )
        self._features = np.memmap(path, np.dtype("<f4"), "r", shape=(rows, self._dim))
        self._frames = self._video_frames()

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.folder / name}: cannot be read: {error}") from error

    def _video_frames(self) -> dict[str, list[str]]:
        path = self.folder / "video2frames.txt"
        try:
            content = ast.literal_eval(self._read("video2frames.txt"))
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(f"{path}: not a Python literal: {error}") from error
        if not isinstance(content, dict) or not content:
            raise DataError(f"{path}: expected a dictionary of videos, found {type(content)}")
        for video_id, frames in content.items():
            check_id(video_id, str(path))
            if not isinstance(frames, list) or not frames:
                raise DataError(f"{path}: video {video_id!r} has no list of frames")
            missing = next((frame for frame in frames if frame not in self._row), None)
            if missing is not None:
                raise DataError(f"{path}: no feature of frame {missing!r} of video {video_id!r}")
        return content

    @property
    def dim(self) -> int:
        """Width C of every frame."""
        return self._dim

    def frame_count(self, video_id: str) -> int:
        """Frames of a video, without reading them."""
        if video_id not in self._frames:
            raise DataError(f"{self.folder}: no frames of video {video_id!r}")
        return len(self._frames[video_id])

    def __getitem__(self, key: str) -> np.ndarray:
        self.frame_count(key)
        rows = [self._row[frame] for frame in self._frames[key]]
        return check_sequence(self._features[rows], f"{self.folder}[{key!r}]", self._dim)

    def __contains__(self, key: object) -> bool:
        return key in self._frames

    def __iter__(self) -> Iterator[str]:
        return iter(self._frames)

    def __len__(self) -> int:
        return len(self._frames)


def read_captions(path: str | PathLike[str]) -> list[tuple[str, str, str]]:
    """Query id, video id and sentence of every line of a caption file.

    Raises:
        DataError: a line without a sentence or without `#`, or an id that occurs twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    found: dict[str, tuple[str, str, str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        query_id, _, sentence = line.strip().partition(" ")
        video_id, mark, _ = query_id.partition("#")
        if not mark or not sentence.strip():
            raise DataError(
                f"{path}, line {number}: expected 'video#enc#n sentence', found {line[:60]!r}"
            )
        check_id(video_id, f"{path}, line {number}")
        if query_id in found:
            raise DataError(f"{path}, line {number}: the id {query_id!r} occurs twice")
        found[query_id] = (query_id, video_id, sentence.strip())
    if not found:
        raise DataError(f"{path}: no queries")
    return list(found.values())


def read_collection(
    root: str | PathLike[str], collection: str, visual: str, split: str
) -> GroundingDataset:
    """One split of a collection in MS-SL's layout; features are read when asked for.

    Args:
        root: folder of all collections.
        collection: "tvr", "activitynet" or "charades".
        visual: folder of the video features, such as "i3d_resnet".
        split: "train", "val" or "test".

    Raises:
        DataError: a file is missing or malformed, or a query has no words or no video features.
    """
    folder = Path(root) / collection
    captions = read_captions(folder / "TextData" / f"{collection}{split}.caption.txt")
    frames = FrameStore(folder / "FeatureData" / visual)
    words = HDF5Store(folder / "TextData" / f"roberta_{collection}_query_feat.hdf5")
    return _joined(f"{collection}/{split}", captions, frames, words)


def _joined(
    name: str, captions: Sequence[tuple[str, str, str]], frames: FrameStore, words: FeatureStore
) -> GroundingDataset:
    videos: Mapping[str, Video] = {
        video_id: Video(video_id, float(frames.frame_count(video_id)), FRAMES)
        for video_id in dict.fromkeys(video_id for _, video_id, _ in captions)
    }
    silent = next((query_id for query_id, _, _ in captions if query_id not in words), None)
    if silent is not None:
        raise DataError(f"{words}: no words of the query {silent!r}")
    nowhere = np.zeros((0, 2))
    return GroundingDataset(
        name=name,
        videos=videos,
        queries=tuple(Query(key, video, text, nowhere) for key, video, text in captions),
        video_features=frames,
        text_features=words,
    )
