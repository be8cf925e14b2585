"""The papers' data sets: what each needs on disk, on which time grid, and where to get it.

A part knows what it expects and inspects what it finds; `tvg_lib.data.doctor` looks for the parts
and reports. Expected shapes are those of the papers' released configurations (SnAG, HieraMamba,
Moment-DETR, MS-SL); md5 sums are the ones that SnAG's README publishes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from tvg_lib.data import qvhighlights
from tvg_lib.data.features import FeatureStore, FolderStore, HDF5Store
from tvg_lib.data.readers import (
    Annotations,
    read_activitynet,
    read_charades,
    read_qvhighlights,
    read_snag,
    read_tacos,
)
from tvg_lib.errors import DataError
from tvg_lib.moments import QVHIGHLIGHTS_2S, TimeGrid


@dataclass(frozen=True)
class Clips:
    """The time grid of released clip features, in frames.

    Attributes:
        size, stride: of the files on disk.
        fps: None where it differs between videos and stands in the annotations.
        keep_every: clips are thinned to every so many-th one before use.
        resample_to: every video is brought to this many clips before use.
    """

    size: float
    stride: float
    fps: float | None
    keep_every: int = 1
    resample_to: int | None = None

    def grid(self, annotations: Annotations, video_id: str) -> TimeGrid | None:
        """The grid of a video's files, None where no annotation gives its frame rate."""
        fps = self.fps if self.fps is not None else annotations.fps.get(video_id)
        return None if fps is None else TimeGrid(self.size, self.stride, fps)

    def __str__(self) -> str:
        rate = "frame rate in the annotations" if self.fps is None else f"{self.fps:g} fps"
        text = f"clips of {self.size:g} every {self.stride:g} frames, {rate}"
        if self.keep_every > 1:
            text += f", 1 in {self.keep_every} used"
        if self.resample_to is not None:
            text += f", resampled to {self.resample_to}"
        return text


@dataclass
class Case:
    """What is known of one data set while its parts are examined one after the other."""

    sample: int
    _required: list[Annotations] = field(default_factory=list)
    _optional: list[Annotations] = field(default_factory=list)

    def add(self, annotations: Annotations, optional: bool) -> None:
        """Note annotations that were found."""
        (self._optional if optional else self._required).append(annotations)

    @property
    def annotations(self) -> list[Annotations]:
        """Those that features are held against: other releases only where the main one is absent,
        since their lists of videos differ."""
        return self._required or self._optional

    def pick(self, ids: Sequence[str]) -> list[str]:
        """Some of the ids, evenly spread; all of them with `sample` 0."""
        if self.sample == 0 or len(ids) <= self.sample:
            return list(ids)
        return [ids[i] for i in np.linspace(0, len(ids) - 1, self.sample).astype(int)]


class Part(Protocol):
    """One thing that a data set needs on disk.

    `places` are tried in order below the root. `inspect` says what is there or raises `DataError`.
    """

    @property
    def title(self) -> str: ...

    @property
    def places(self) -> tuple[str, ...]: ...

    @property
    def optional(self) -> bool: ...

    @property
    def expected(self) -> str: ...

    def inspect(self, path: Path, case: Case) -> str: ...


@dataclass(frozen=True)
class AnnotationPart:
    """An annotation file and the reader that understands it."""

    title: str
    places: tuple[str, ...]
    expected: str
    read: Callable[[Path], Annotations]
    optional: bool = False

    def inspect(self, path: Path, case: Case) -> str:
        annotations = self.read(path)
        case.add(annotations, self.optional)
        return (
            f"{len(annotations.videos)} videos, {len(annotations.queries)} queries, "
            f"{annotations.tally}"
        )


@dataclass(frozen=True)
class ClipPart:
    """Clip features, one file a video; one of several streams where they are concatenated."""

    title: str
    places: tuple[str, ...]
    dim: int
    clips: Clips
    array: str | None = None
    optional: bool = False

    @property
    def expected(self) -> str:
        return f"(T, {self.dim}) a video, {self.clips}"

    def inspect(self, path: Path, case: Case) -> str:
        store = FolderStore(path, dim=self.dim, array=self.array)
        known = [(a, key) for a in case.annotations for key in a.videos]
        present = _report_missing(store, dict.fromkeys(key for _, key in known), "videos")
        owners = {key: annotations for annotations, key in known}
        fitting = 0
        for key in case.pick(present):
            length = len(store[key])
            grid = self.clips.grid(owners[key], key) if key in owners else None
            if grid is not None:
                grid.check(length, owners[key].videos[key], f"{path.name}: video {key!r}")
                fitting += 1
        read = len(case.pick(present))
        return f"{len(store)} videos; {read} read: width {self.dim}, {fitting} fit their grid"


@dataclass(frozen=True)
class WordPart:
    """Word features, one file a query."""

    title: str
    places: tuple[str, ...]
    dim: int
    prefix: str = ""
    array: str | None = None
    optional: bool = False

    @property
    def expected(self) -> str:
        return f"(K, {self.dim}) a query"

    def inspect(self, path: Path, case: Case) -> str:
        store = FolderStore(path, dim=self.dim, prefix=self.prefix, array=self.array)
        queries = dict.fromkeys(q.id for a in case.annotations for q in a.queries)
        return f"{len(store)} queries; {_read_sample(store, queries, case)}"


@dataclass(frozen=True)
class HDF5WordPart:
    """Word features of every query in one HDF5 file."""

    title: str
    places: tuple[str, ...]
    dim: int
    optional: bool = False

    @property
    def expected(self) -> str:
        return f"one HDF5 file, (K, {self.dim}) a query"

    def inspect(self, path: Path, case: Case) -> str:
        store = HDF5Store(path, dim=self.dim)
        try:
            return f"{len(store)} queries; {_read_sample(store, {}, case)}"
        finally:
            store.close()


@dataclass(frozen=True)
class BigFilePart:
    """MS-SL's frame features: raw float32 rows, with their ids and their shape in text files."""

    title: str
    places: tuple[str, ...]
    dim: int | None
    optional: bool = False

    @property
    def expected(self) -> str:
        width = "C" if self.dim is None else str(self.dim)
        return f"feature.bin (frames, {width}), shape.txt, id.txt, video2frames.txt"

    def inspect(self, path: Path, case: Case) -> str:
        absent = [
            name
            for name in ("feature.bin", "shape.txt", "id.txt", "video2frames.txt")
            if not (path / name).is_file()
        ]
        if absent:
            raise DataError(f"{path}: {', '.join(absent)} missing")
        shape = (path / "shape.txt").read_text(encoding="latin-1").split()
        if len(shape) != 2 or not all(number.isdecimal() for number in shape):
            raise DataError(f"{path / 'shape.txt'}: expected two numbers, found {shape[:4]}")
        frames, dim = map(int, shape)
        if self.dim is not None and dim != self.dim:
            raise DataError(f"{path}: expected features of width {self.dim}, found {dim}")
        size = (path / "feature.bin").stat().st_size
        if size != frames * dim * 4:
            raise DataError(
                f"{path / 'feature.bin'}: {frames} x {dim} float32 are {frames * dim * 4} bytes, "
                f"found {size}"
            )
        return f"{frames} frames of width {dim}"


@dataclass(frozen=True)
class LinesPart:
    """A text file of one entry a line, known by how its first line looks."""

    title: str
    places: tuple[str, ...]
    expected: str
    fits: Callable[[str], bool]
    optional: bool = False

    def inspect(self, path: Path, case: Case) -> str:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline(65536).rstrip("\n")
            if not self.fits(first):
                raise DataError(f"{path}: expected {self.expected}, found {first[:60]!r}")
            count = 1 + sum(1 for _ in file)
        return f"{count} lines"


@dataclass(frozen=True)
class CaptionsPart:
    """QVH-captions' captions of one split, embedded by MiniLM on first use."""

    split: Literal["val", "test"]
    optional: bool = False

    @property
    def title(self) -> str:
        return f"captions, {self.split}"

    @property
    def places(self) -> tuple[str, ...]:
        return (f"qvhighlights/captions_{self.split}.zip", f"qvhighlights/captions_{self.split}")

    @property
    def expected(self) -> str:
        return "one caption every 2 s; MiniLM makes them (T, 384), and queries (K, 384)"

    def inspect(self, path: Path, case: Case) -> str:
        from tvg_lib.data import qvh_captions

        captions = qvh_captions.captions(self.split, path.parent)
        asked = {
            key: duration
            for annotations in case.annotations
            if annotations.name == self.split
            for key, duration in annotations.videos.items()
        }
        missing = [key for key in asked if key not in captions]
        if missing:
            raise DataError(f"{path}: no captions of {len(missing)} videos, e.g. {missing[:3]}")
        for key, duration in asked.items():
            QVHIGHLIGHTS_2S.check(len(captions[key]), duration, f"captions of {key!r}")
        return f"{len(captions)} videos, {len(asked)} fit their grid"


def _report_missing(store: FeatureStore, wanted: Iterable[str], what: str) -> list[str]:
    """Wanted ids that the store holds (all of its ids where nothing is known to be wanted)."""
    wanted = list(wanted)
    missing = [key for key in wanted if key not in store]
    if missing:
        raise DataError(
            f"{store!r}: {len(missing)} of {len(wanted)} annotated {what} are missing, "
            f"e.g. {missing[:3]}"
        )
    return wanted or list(store)


def _read_sample(store: FeatureStore, queries: Iterable[str], case: Case) -> str:
    picked = case.pick(_report_missing(store, queries, "queries"))
    for key in picked:
        store[key]
    return f"{len(picked)} read: width {store.dim}"


@dataclass(frozen=True)
class DatasetSpec:
    """A data set of the papers with one kind of features.

    Attributes:
        name: data set and features.
        methods: whose experiments use it.
        parts: what belongs on disk.
        source: where to get it, in words and addresses.
        archives: published archive names and their md5.
    """

    name: str
    methods: str
    parts: tuple[Part, ...]
    source: str
    archives: tuple[tuple[str, str], ...] = ()


_SNAG = "https://github.com/fmu2/snag_release (README, links to features and annotations)"
_MAD = "https://github.com/Soldelli/MAD (access on request)"
_MS_SL = "https://github.com/HuiGuanLab/ms-sl (README, links to features)"
_GLOVE = LinesPart(
    "GloVe vectors",
    ("glove.6B.300d.txt", "glove/glove.6B.300d.txt"),
    "a word and 300 numbers a line (glove.6B, https://nlp.stanford.edu/projects/glove)",
    lambda line: len(line.split(" ")) == 301,
)


def _charades_split(split: str) -> AnnotationPart:
    def read_charades_beside_jsonl(path: Path) -> Annotations:
        durations = path.with_suffix(".jsonl")  # lighthouse's form of the same split
        if not durations.is_file():
            raise DataError(f"{path}: durations are read from {durations.name}, which is missing")
        return read_charades(path, read_qvhighlights(durations).videos)

    return AnnotationPart(
        f"{split} annotations (VideoX)",
        (f"annotations/charades_sta_{split}.txt", f"charades_sta/charades_sta_{split}.txt"),
        "Charades-STA txt, with lighthouse's jsonl beside it for the durations",
        read_charades_beside_jsonl,
        optional=True,
    )


def _mad(name: str, dim: int, annotations: str, places: tuple[str, ...]) -> DatasetSpec:
    """Both releases of MAD's CLIP features; `places` are the folders that hold video/ and text/."""
    return DatasetSpec(
        name,
        "SnAG, MSCL, HieraMamba" if dim == 512 else "HieraMamba",
        (
            AnnotationPart("annotations", (annotations,), "SnAG json", read_snag),
            ClipPart(
                "CLIP frames",
                tuple(f"{place}/video" for place in places)
                + (("mad/clip_features/video_5fps_512d",) if dim == 512 else ()),
                dim,
                Clips(1, 1, 5),
            ),
            WordPart(
                "CLIP words",
                tuple(f"{place}/text" for place in places)
                + (("mad/clip_features/token_512d",) if dim == 512 else ()),
                dim,
            ),
        ),
        f"features: {_MAD}; annotations: https://github.com/jbistanbul/hieramamba (README)"
        + (f"; both: {_SNAG}" if dim == 512 else ""),
        (("mad.tar.gz", "dd4fc6f8e2297eb10a1c82d405b03658"),) if dim == 512 else (),
    )


def _retrieval(name: str, folder: str, feature: str, dim: int | None, words: int) -> DatasetSpec:
    """MS-SL's layout of partially relevant video retrieval, which MamFusion uses."""
    captions = [
        LinesPart(
            f"{split} captions",
            (f"{folder}/TextData/{folder}{split}.caption.txt",),
            "'video#enc#number sentence' a line",
            lambda line: "#" in line.partition(" ")[0] and bool(line.partition(" ")[2].strip()),
        )
        for split in ("train", "val", "test")
    ]
    return DatasetSpec(
        name,
        "MamFusion",
        (
            *captions,
            BigFilePart(f"{feature} frames", (f"{folder}/FeatureData/{feature}",), dim),
            HDF5WordPart(
                "RoBERTa words", (f"{folder}/TextData/roberta_{folder}_query_feat.hdf5",), words
            ),
        ),
        _MS_SL,
    )


DATASETS: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        "TACoS, C3D + GloVe",
        "SnAG, MSCL, HieraMamba",
        (
            AnnotationPart(
                "annotations", ("tacos/annotations/tacos.json",), "SnAG json", read_snag
            ),
            *(
                AnnotationPart(
                    f"{split} annotations (VideoX)",
                    (f"annotations/tacos_{split}.json", f"tacos/{split}.json"),
                    "VideoX json",
                    read_tacos,
                    optional=True,
                )
                for split in ("train", "val", "test")
            ),
            ClipPart("C3D clips", ("tacos/c3d_features",), 4096, Clips(16, 4, None, keep_every=4)),
            _GLOVE,
        ),
        _SNAG,
        (("tacos.tar.gz", "a96537114a930038ab8ddb64a17df6e0"),),
    ),
    DatasetSpec(
        "Ego4D-NLQ, SlowFast + BERT",
        "SnAG, MSCL",
        (
            AnnotationPart(
                "annotations",
                (
                    "ego4d_slowfast_bert/annotations/ego4d_slowfast.json",
                    "ego4d/annotations/ego4d_slowfast.json",
                ),
                "SnAG json",
                read_snag,
            ),
            ClipPart(
                "SlowFast clips",
                ("ego4d_slowfast_bert/slowfast_features", "ego4d/slowfast_features"),
                2304,
                Clips(32, 16, 30),
            ),
            WordPart(
                "BERT words", ("ego4d_slowfast_bert/bert_features", "ego4d/bert_features"), 768
            ),
        ),
        _SNAG,
        (("ego4d_slowfast_bert.tar.gz", "d57d03737493e4c7aae39dd3d3d5597b"),),
    ),
    DatasetSpec(
        "Ego4D-NLQ, EgoVLP",
        "SnAG, MSCL, HieraMamba",
        (
            AnnotationPart(
                "annotations",
                (
                    "ego4d/annotations/ego4d_egovlp.json",
                    "ego4d_egovlp/annotations/ego4d_egovlp.json",
                ),
                "SnAG json",
                read_snag,
            ),
            ClipPart(
                "EgoVLP clips",
                ("ego4d/egovlp_features/video", "ego4d_egovlp/egovlp_features/video"),
                256,
                Clips(32, 8, 30, keep_every=2),
            ),
            WordPart(
                "EgoVLP words",
                (
                    "ego4d/egovlp_features/text/token_768d",
                    "ego4d_egovlp/egovlp_features/text/token_768d",
                ),
                768,
            ),
        ),
        _SNAG,
        (("ego4d_egovlp.tar.gz", "44e013aa5c4dcbc4d474fdba5c172804"),),
    ),
    _mad("MAD, CLIP ViT-B/32", 512, "mad/annotations/mad.json", ("mad", "mad/clip_features")),
    _mad("MAD-v2, CLIP ViT-L/14", 768, "madv2/madv2.json", ("madv2",)),
    DatasetSpec(
        "Charades-STA, C3D + GloVe",
        "SnAG",
        (
            AnnotationPart(
                "annotations",
                (
                    "charades_sta_c3d/annotations/charades_sta.json",
                    "charades_sta/annotations/charades_sta.json",
                ),
                "SnAG json",
                read_snag,
            ),
            _charades_split("train"),
            _charades_split("test"),
            ClipPart(
                "C3D clips",
                ("charades_sta_c3d/c3d_features", "charades_sta/c3d_features"),
                4096,
                Clips(16, 4, 24, resample_to=256),
            ),
            _GLOVE,
        ),
        _SNAG,
        (("charades_sta_c3d.tar.gz", "10300461e5f713dffcc038506c73aec7"),),
    ),
    DatasetSpec(
        "Charades-STA, I3D + GloVe",
        "SnAG, MSCL",
        (
            AnnotationPart(
                "annotations",
                (
                    "charades_sta_i3d/annotations/charades_sta.json",
                    "charades_sta/annotations/charades_sta.json",
                ),
                "SnAG json",
                read_snag,
            ),
            _charades_split("train"),
            _charades_split("test"),
            *(
                ClipPart(
                    f"I3D clips, {stream}",
                    (
                        f"charades_sta_i3d/i3d_features/kinetics/{stream}",
                        f"charades_sta/i3d_features/kinetics/{stream}",
                    ),
                    1024,
                    Clips(16, 4, 24, resample_to=256),
                )
                for stream in ("rgb", "flow")
            ),
            _GLOVE,
        ),
        _SNAG,
        (("charades_sta_i3d.tar.gz", "57ad93a548dc5428c284e3fc5852136d"),),
    ),
    DatasetSpec(
        "ActivityNet Captions, C3D (PCA) + GloVe",
        "SnAG, MSCL",
        (
            AnnotationPart(
                "annotations", ("anet_1.3/annotations/anet_1.3.json",), "SnAG json", read_snag
            ),
            AnnotationPart(
                "val_1 annotations (VideoX)",
                ("annotations/activitynet_val1.json",),
                "ActivityNet Captions json",
                read_activitynet,
                optional=True,
            ),
            ClipPart(
                "C3D clips", ("anet_1.3/c3d_features",), 500, Clips(16, 8, None, resample_to=256)
            ),
            _GLOVE,
        ),
        _SNAG,
        (("anet_1.3.tar.gz", "4da7bbd46ebf43906cb44e696a4a1852"),),
    ),
    DatasetSpec(
        "QVHighlights, SlowFast + CLIP",
        "A2FA + F2SGD (CLIP alone)",
        (
            *(
                AnnotationPart(
                    f"{split} annotations",
                    qvhighlights.ANNOTATIONS[split],
                    "QVHighlights jsonl",
                    read_qvhighlights,
                )
                for split in qvhighlights.SPLITS
            ),
            ClipPart(
                "SlowFast clips",
                ("qvhighlights/slowfast_features", "qvhighlights/features/slowfast_features"),
                2304,
                Clips(2, 2, 1),
                array="features",
            ),
            ClipPart(
                "CLIP clips",
                qvhighlights.CLIPS,
                qvhighlights.DIM,
                Clips(2, 2, 1),
                array="features",
            ),
            WordPart(
                "CLIP words",
                qvhighlights.WORDS,
                qvhighlights.DIM,
                prefix="qid",
                array="last_hidden_state",
            ),
        ),
        "https://github.com/jayleicn/moment_detr (README, moment_detr_features.tar.gz; data/)",
    ),
    DatasetSpec(
        "QVH-captions, MiniLM",
        "all, on a laptop",
        (
            *(
                AnnotationPart(
                    f"{split} annotations",
                    (f"qvhighlights/{split}.jsonl",),
                    "QVHighlights jsonl",
                    read_qvhighlights,
                )
                for split in ("val", "test")
            ),
            CaptionsPart("val"),
            CaptionsPart("test"),
        ),
        "python -m tvg_lib.data.qvh_captions (from jayleicn/moment_detr b7e553a and "
        "YoucanBaby/VTG-GPT 9d66061)",
    ),
    _retrieval("TVR, I3D + ResNet, RoBERTa", "tvr", "i3d_resnet", 3072, 768),
    _retrieval("ActivityNet retrieval, I3D, RoBERTa", "activitynet", "i3d", None, 1024),
    _retrieval("Charades-STA retrieval, I3D, RoBERTa", "charades", "i3d_rgb_lgi", 1024, 1024),
)
