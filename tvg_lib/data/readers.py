"""Readers of the field's annotation files, and the way from them to a `GroundingDataset`.

    read_snag            SnAG's json, HieraMamba's too    moments in seconds, fps a video
    read_qvhighlights    QVHighlights jsonl               also lighthouse's TACoS and Charades-STA
    read_tacos           VideoX' TACoS json               moments in frames
    read_charades        Charades-STA txt                 durations given beside it
    read_activitynet     ActivityNet Captions json

    annotations + grid + feature stores  --join-->  GroundingDataset

**Moments outside the video.** Real files hold moments that end after their video, and worse. All
readers treat them alike (the rule is SnAG's) and count what they do in a `Tally`:

    overlaps the video but sticks out            clipped to [0, duration]
    touches the video nowhere                    dropped ("outside")
    of no length, before or after clipping       dropped ("empty")
    ends before it starts                        dropped ("reversed")

A query whose moments are all dropped, whose sentence is blank, or whose video has no known duration
is left out and counted. `strict=True` raises instead, at the first of these. What is not a matter
of policy is always an error: text where a number belongs, an id that occurs twice or is not a plain
name, NaN, a missing field. Errors name file and line or video.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tvg_lib.data.dataset import GroundingDataset, Query, Saliency, Video
from tvg_lib.data.features import FeatureStore, check_id
from tvg_lib.errors import DataError
from tvg_lib.json_fields import (
    field_of,
    json_lines,
    json_list,
    json_number,
    json_object,
    json_text,
    positive_number,
    read_json,
    read_text,
    text_lines,
)
from tvg_lib.moments import QVHIGHLIGHTS_2S, TimeGrid

_log = logging.getLogger(__name__)

Source = str | PathLike[str]


@dataclass
class Tally:
    """What a reader kept, changed and left out.

    Attributes:
        moments: moments in the result.
        clipped: of those, the ones cut to their video.
        overrun: most seconds cut off one moment.
        outside, empty, reversed: moments dropped, by reason.
        queries_without_moment: queries left out because all of their moments were dropped.
        queries_without_text: queries left out because their sentence is blank.
        queries_without_video: queries left out because their video has no known duration.
        videos_without_query: videos left out because nothing is asked about them.
    """

    moments: int = 0
    clipped: int = 0
    overrun: float = 0.0
    outside: int = 0
    empty: int = 0
    reversed: int = 0
    queries_without_moment: int = 0
    queries_without_text: int = 0
    queries_without_video: int = 0
    videos_without_query: int = 0

    @property
    def left_out(self) -> int:
        """Moments, queries and videos that the file holds and the result does not."""
        return (
            self.outside
            + self.empty
            + self.reversed
            + self.queries_without_text
            + self.queries_without_video
            + self.videos_without_query
        )

    def __str__(self) -> str:
        notes = [f"{self.moments} moments"]
        if self.clipped:
            notes.append(f"{self.clipped} clipped to their video (at most {self.overrun:.2f} s)")
        for entry in fields(self):
            count = getattr(self, entry.name)
            if count and entry.name not in ("moments", "clipped", "overrun"):
                verb = "left out" if "_" in entry.name else "dropped"
                notes.append(f"{count} {entry.name.replace('_', ' ')} {verb}")
        return ", ".join(notes)


@dataclass(frozen=True, eq=False)
class Annotations:
    """The content of an annotation file, the same for every format.

    Attributes:
        name: for records and messages.
        videos: duration in seconds by video id.
        queries: in the order of the file, with moments in seconds.
        tally: what the reader kept, changed and left out.
        fps: frames per second by video id, where the file gives them.
        recordings: what a video was cut from, by video id, where that is known.
    """

    name: str
    videos: Mapping[str, float]
    queries: tuple[Query, ...]
    tally: Tally
    fps: Mapping[str, float] = field(default_factory=dict)
    recordings: Mapping[str, str] = field(default_factory=dict)

    def restrict(self, video_ids: Iterable[str]) -> "Annotations":
        """The annotations of some of the videos, e.g. of those that features exist for."""
        keep = set(video_ids)
        return Annotations(
            self.name,
            {key: duration for key, duration in self.videos.items() if key in keep},
            tuple(query for query in self.queries if query.video_id in keep),
            self.tally,
            {key: fps for key, fps in self.fps.items() if key in keep},
            {key: name for key, name in self.recordings.items() if key in keep},
        )

    def grids(self, clip_size: float, stride: float) -> dict[str, TimeGrid]:
        """One grid a video, for features counted in frames of each video's own frame rate.

        Raises:
            DataError: the file does not give frame rates.
        """
        without = [key for key in self.videos if key not in self.fps]
        if without:
            raise DataError(
                f"{self.name}: {len(without)} videos have no frame rate in the annotations, the "
                f"first is {without[0]!r}; give one TimeGrid instead"
            )
        return {key: TimeGrid(clip_size, stride, self.fps[key]) for key in self.videos}

    def __repr__(self) -> str:
        hours = sum(self.videos.values()) / 3600
        return (
            f"Annotations({self.name}: {len(self.videos)} videos, {hours:.1f} h, "
            f"{len(self.queries)} queries; {self.tally})"
        )


def join(
    annotations: Annotations,
    grid: TimeGrid | Mapping[str, TimeGrid],
    video_features: FeatureStore,
    text_features: FeatureStore,
    sentence_features: FeatureStore | None = None,
) -> GroundingDataset:
    """Annotations and features as one data set. No feature is read yet.

    Args:
        annotations: from one of the readers.
        grid: where the clips of `video_features` lie, one for all or one a video
            (`annotations.grids`, `Resampled.grid`).
        video_features: by video id.
        text_features: word features by query id.
        sentence_features: one vector by query id.

    Raises:
        DataError: a video or a query has no features or no grid; `annotations.restrict` leaves
            such videos out on purpose.
    """
    name = annotations.name
    query_ids = [query.id for query in annotations.queries]
    needs: list[tuple[str, Iterable[str], FeatureStore | Mapping[str, TimeGrid]]] = [
        ("videos", annotations.videos, video_features),
        ("queries", query_ids, text_features),
    ]
    if sentence_features is not None:
        needs.append(("queries", query_ids, sentence_features))
    if not isinstance(grid, TimeGrid):
        needs.append(("videos", annotations.videos, grid))
    for what, ids, holder in needs:
        missing = [key for key in ids if key not in holder]
        if missing:
            holds = "the grids" if isinstance(holder, Mapping) else repr(holder)
            raise DataError(
                f"{name}: {len(missing)} of its {what} are missing from {holds}, e.g. {missing[:3]}"
            )
    videos = {
        key: Video(
            key,
            duration,
            grid if isinstance(grid, TimeGrid) else grid[key],
            annotations.recordings.get(key),
        )
        for key, duration in annotations.videos.items()
    }
    return GroundingDataset(
        name, videos, annotations.queries, video_features, text_features, sentence_features
    )


def durations_from_features(
    store: FeatureStore, grid: TimeGrid, video_ids: Iterable[str]
) -> dict[str, float]:
    """Seconds that the features of each video reach to: durations where no file gives them.

    Reads one video after the other. Ids that the store does not hold are left out.
    """
    return {
        key: grid.clip_span(len(store[key]) - 1)[1]
        for key in dict.fromkeys(video_ids)
        if key in store
    }


# Reading -------------------------------------------------------------------------------------

# A video of QVHighlights is named after its recording and the seconds it was cut from.
_CUT = re.compile(r"(.+)_\d+(?:\.\d+)?_\d+(?:\.\d+)?")


def read_snag(
    path: Source,
    split: str | Sequence[str] | None = None,
    *,
    name: str | None = None,
    strict: bool = False,
) -> Annotations:
    """SnAG's json, which HieraMamba uses too.

    Two layouts are understood: `{"version", "database": {video: {"subset", ...}}}`, and the videos
    grouped by split, `{split: {video: {...}}}`, which the released loaders index. A video is
    `{"duration", "fps", "num_frames", "annotations": [{"segment": [start, end], "sentence",
    "sentence_id"}]}` with segments in seconds. `duration` may be missing (then it is
    num_frames / fps, as SnAG has it) and so may `num_frames` (HieraMamba), `sentence_id` (then it
    is the video's id and the number of the sentence) and `annotations` (the video is left out).

    Args:
        path: the file.
        split: one split or several, joined in that order; None for all of the file.
        name: of the annotations; the file's and the splits' by default.
        strict: raise where the policy of this module would clip or drop.

    Raises:
        DataError: see the module.
    """
    path = Path(path)
    content = json_object(read_json(path), str(path))
    if "database" in content:
        groups: dict[str, dict[str, Any]] = {}
        for video_id, entry in json_object(content["database"], f"{path}: 'database'").items():
            where = f"{path}: video {video_id!r}"
            subset = json_text(
                field_of(json_object(entry, where), "subset", where), f"{where}: 'subset'"
            )
            groups.setdefault(subset, {})[video_id] = entry
    else:
        groups = {
            key: json_object(value, f"{path}: split {key!r}")
            for key, value in content.items()
            if key != "version"
        }
    splits = (split,) if isinstance(split, str) else tuple(groups if split is None else split)
    builder = _Builder(path, name or f"{path.stem}/{'+'.join(splits)}", strict)
    for chosen in splits:
        if chosen not in groups:
            raise DataError(f"{path}: there is no split {chosen!r}, only {sorted(groups)}")
        for video_id, entry in groups[chosen].items():
            _snag_video(builder, video_id, entry)
    return builder.finish()


def _snag_video(builder: "_Builder", video_id: str, entry: Any) -> None:
    where = f"{builder.path}: video {video_id!r}"
    entry = json_object(entry, where)
    fps = positive_number(field_of(entry, "fps", where), f"{where}: 'fps'")
    if "duration" in entry:
        duration = positive_number(entry["duration"], f"{where}: 'duration'")
    else:
        duration = _seconds(entry, fps, where)
    builder.video(video_id, duration, fps)
    for number, item in enumerate(
        json_list(entry.get("annotations", []), f"{where}: 'annotations'")
    ):
        place = f"{where}, annotation {number}"
        item = json_object(item, place)
        builder.query(
            place,
            query_id=item.get("sentence_id", f"{video_id}_{number:04d}"),
            video_id=video_id,
            text=field_of(item, "sentence", place),
            windows=[field_of(item, "segment", place)],
        )


def _seconds(entry: Mapping[str, Any], fps: float, where: str) -> float:
    """Duration of a video from its frames; two numbers in range may have a quotient beyond it."""
    frames = positive_number(field_of(entry, "num_frames", where), f"{where}: 'num_frames'")
    return positive_number(frames / fps, f"{where}: 'num_frames' / 'fps'")


def read_qvhighlights(
    path: Source, *, name: str | None = None, strict: bool = False
) -> Annotations:
    """QVHighlights jsonl: moment retrieval and, where it is given, saliency.

    One query a line: `{"qid", "query", "vid", "duration", "relevant_windows": [[start, end], ...],
    "relevant_clip_ids": [...], "saliency_scores": [[one an annotator], ...]}`, in seconds and
    2-second clips. Without `relevant_windows` (the official test file) queries have no moments;
    without the saliency fields (lighthouse's TACoS and Charades-STA) no saliency. Query ids become
    strings. A video called `NAME_START_END` was cut from the recording NAME.

    Raises:
        DataError: see the module; also where a video's lines disagree on its duration, or where a
            clip with a saliency score lies outside the video.
    """
    path = Path(path)
    builder = _Builder(path, name or path.stem, strict)
    for where, entry in json_lines(read_text(path), str(path)):
        query_id = field_of(entry, "qid", where)
        video_id = check_id(field_of(entry, "vid", where), where)
        duration = positive_number(field_of(entry, "duration", where), f"{where}: 'duration'")
        builder.video(video_id, duration, where=where)
        windows = entry.get("relevant_windows")
        builder.query(
            where,
            query_id=str(query_id) if type(query_id) is int else query_id,
            video_id=video_id,
            text=field_of(entry, "query", where),
            windows=None if windows is None else json_list(windows, f"{where}: 'relevant_windows'"),
            saliency=_saliency(entry, duration, where),
        )
    annotations = builder.finish()
    cuts = {key: _CUT.fullmatch(key) for key in annotations.videos}
    return replace(annotations, recordings={key: cut[1] for key, cut in cuts.items() if cut})


def _saliency(entry: Mapping[str, Any], duration: float, where: str) -> Saliency | None:
    if "saliency_scores" not in entry:
        return None
    clips = json_list(field_of(entry, "relevant_clip_ids", where), f"{where}: 'relevant_clip_ids'")
    scores = json_list(entry["saliency_scores"], f"{where}: 'saliency_scores'")
    rows = [json_list(row, f"{where}: 'saliency_scores'") for row in scores]
    if len(clips) != len(rows):
        raise DataError(f"{where}: {len(clips)} relevant_clip_ids but {len(rows)} saliency_scores")
    if len({len(row) for row in rows}) > 1:
        raise DataError(f"{where}: saliency_scores of different numbers of annotators")
    for value in (*clips, *(score for row in rows for score in row)):
        if type(value) is not int or value < 0:
            raise DataError(f"{where}: clip ids and saliency are integers >= 0, found {value!r}")
    if clips and QVHIGHLIGHTS_2S.clip_span(max(clips))[0] >= duration:
        raise DataError(f"{where}: clip {max(clips)} lies outside the video of {duration} s")
    if len(set(clips)) != len(clips):
        raise DataError(f"{where}: a clip id occurs twice in 'relevant_clip_ids'")
    return Saliency(
        np.array(clips, dtype=np.int64),
        np.array(rows, dtype=np.int64).reshape(len(rows), len(rows[0]) if rows else 0),
    )


def read_tacos(path: Source, *, name: str | None = None, strict: bool = False) -> Annotations:
    """VideoX' TACoS json: `{video: {"timestamps": [[first, last], ...], "sentences", "fps",
    "num_frames"}}`, timestamps in frames.

    The container's suffix is dropped from the ids ("s30-d52.avi" becomes "s30-d52"), as in the
    other forms of this data set and in the names of its features.

    Raises:
        DataError: see the module.
    """
    path = Path(path)
    builder = _Builder(path, name or path.stem, strict)
    for key, entry in json_object(read_json(path), str(path)).items():
        where = f"{path}: video {key!r}"
        entry = json_object(entry, where)
        fps = positive_number(field_of(entry, "fps", where), f"{where}: 'fps'")
        builder.video(video_id := key.removesuffix(".avi"), _seconds(entry, fps, where), fps)
        _paired_lists(builder, entry, video_id, where, per_second=fps)
    return builder.finish()


def read_activitynet(path: Source, *, name: str | None = None, strict: bool = False) -> Annotations:
    """ActivityNet Captions json: `{video: {"duration", "timestamps", "sentences"}}`, in seconds.

    Raises:
        DataError: see the module.
    """
    path = Path(path)
    builder = _Builder(path, name or path.stem, strict)
    for video_id, entry in json_object(read_json(path), str(path)).items():
        where = f"{path}: video {video_id!r}"
        entry = json_object(entry, where)
        builder.video(
            video_id, positive_number(field_of(entry, "duration", where), f"{where}: 'duration'")
        )
        _paired_lists(builder, entry, video_id, where, per_second=1)
    return builder.finish()


def _paired_lists(
    builder: "_Builder",
    entry: Mapping[str, Any],
    video_id: str,
    where: str,
    per_second: float,
) -> None:
    """Queries of a video whose timestamps and sentences stand in two lists of one length.

    `per_second` is how many units of the timestamps make a second.
    """
    stamps = json_list(field_of(entry, "timestamps", where), f"{where}: 'timestamps'")
    sentences = json_list(field_of(entry, "sentences", where), f"{where}: 'sentences'")
    if len(stamps) != len(sentences):
        raise DataError(f"{where}: {len(stamps)} timestamps but {len(sentences)} sentences")
    for number, (stamp, sentence) in enumerate(zip(stamps, sentences, strict=True)):
        place = f"{where}, sentence {number}"
        builder.query(
            place,
            query_id=f"{video_id}_{number:04d}",
            video_id=video_id,
            text=sentence,
            windows=[[json_number(x, place) / per_second for x in json_list(stamp, place)]],
        )


def read_charades(
    path: Source,
    durations: Mapping[str, float],
    *,
    name: str | None = None,
    strict: bool = False,
) -> Annotations:
    """Charades-STA txt: one query a line, `video start end##sentence`, in seconds.

    Query ids are the video's id and the number of its sentence in the file, so that they do not
    depend on what is dropped.

    Args:
        path: the file.
        durations: seconds by video id, which the format does not hold: `read_qvhighlights` of
            lighthouse's charades_sta_*.jsonl has them (`.videos`), and
            `durations_from_features` takes them from features and their grid.
        name: of the annotations; the file's by default.
        strict: raise where the policy of this module would clip or drop.

    Raises:
        DataError: see the module.
    """
    path = Path(path)
    builder = _Builder(path, name or path.stem, strict)
    counts: dict[str, int] = {}
    for number, line in text_lines(read_text(path)):
        where = f"{path}, line {number}"
        head, mark, sentence = line.partition("##")
        parts = head.split()
        if not mark or len(parts) != 3:
            raise DataError(f"{where}: expected 'video start end##sentence', found {line[:80]!r}")
        video_id = check_id(parts[0], where)
        try:
            window = [float(parts[1]), float(parts[2])]
        except ValueError:
            raise DataError(f"{where}: expected two numbers, found {parts[1:]}") from None
        if video_id in durations:
            duration = positive_number(durations[video_id], f"the duration of {video_id!r}")
            builder.video(video_id, duration, where=where)
        order = counts[video_id] = counts.get(video_id, -1) + 1
        builder.query(
            where,
            query_id=f"{video_id}_{order:04d}",
            video_id=video_id,
            text=sentence,
            windows=[window],
        )
    return builder.finish()


class _Builder:
    """Collects videos and queries of one file and applies the policy to their moments."""

    def __init__(self, path: Path, name: str, strict: bool) -> None:
        self.path = path
        self.name = name
        self.strict = strict
        self.tally = Tally()
        self.videos: dict[str, float] = {}
        self.fps: dict[str, float] = {}
        self.queries: dict[str, Query] = {}

    def video(
        self, video_id: str, duration: float, fps: float | None = None, where: str | None = None
    ) -> None:
        """Note a video. `where` is given by formats that name it once a query."""
        if video_id in self.videos:
            place = where or str(self.path)
            if where is None:
                raise DataError(f"{place}: the video id {video_id!r} occurs twice")
            if self.videos[video_id] != duration:
                raise DataError(
                    f"{place}: video {video_id!r} lasts {duration} s here, but "
                    f"{self.videos[video_id]} s on an earlier line"
                )
            return
        self.videos[check_id(video_id, str(self.path))] = duration
        if fps is not None:
            self.fps[video_id] = fps

    def query(
        self,
        where: str,
        *,
        query_id: Any,
        video_id: str,
        text: Any,
        windows: Sequence[Any] | None,
        saliency: Saliency | None = None,
    ) -> None:
        """Note a query; `windows` in seconds, None where the file keeps them secret."""
        query_id = check_id(query_id, where)
        if query_id in self.queries:
            raise DataError(f"{where}: the query id {query_id!r} occurs twice")
        spans = [self._pair(window, where) for window in windows or ()]
        text = json_text(text, f"{where}: the sentence").strip()
        if not text:
            self._count("queries_without_text", f"{where}: the sentence is blank")
            return
        if video_id not in self.videos:
            self._count(
                "queries_without_video", f"{where}: video {video_id!r} has no known duration"
            )
            return
        kept = [span for span in (self._fit(*s, video_id, where) for s in spans) if span]
        if windows is not None and not kept:
            self._count("queries_without_moment", f"{where}: query {query_id!r} has no moment left")
            return
        self.tally.moments += len(kept)
        moments = np.array(kept, dtype=np.float64).reshape(-1, 2)
        self.queries[query_id] = Query(query_id, video_id, text, moments, saliency)

    def _pair(self, window: Any, where: str) -> tuple[float, float]:
        values = json_list(window, f"{where}: a moment")
        if len(values) != 2:
            raise DataError(f"{where}: a moment is [start, end], found {values!r}"[:300])
        return json_number(values[0], f"{where}: start"), json_number(values[1], f"{where}: end")

    def _fit(
        self, start: float, end: float, video_id: str, where: str
    ) -> tuple[float, float] | None:
        """The moment cut to its video, or None when the policy drops it."""
        duration = self.videos[video_id]
        told = f"{where}: the moment [{start}, {end}] of video {video_id!r} ({duration} s)"
        if end < start:
            fault, reason = "reversed", "ends before it starts"
        elif end == start:
            fault, reason = "empty", "has no length"
        elif end <= 0 or start >= duration:
            fault, reason = "outside", "lies outside it"
        else:
            fault = reason = ""
        if fault:
            self._count(fault, f"{told} {reason}")
            return None
        low, high = max(start, 0.0), min(end, duration)
        if (low, high) != (start, end):
            self._count("clipped", f"{told} is not inside it")
            self.tally.overrun = max(self.tally.overrun, low - start, end - high)
        return low, high

    def _count(self, counter: str, message: str) -> None:
        """One more of what the policy changes or drops; an error when strict."""
        if self.strict:
            raise DataError(message)
        setattr(self.tally, counter, getattr(self.tally, counter) + 1)

    def finish(self) -> Annotations:
        """What was collected, without the videos that nothing is asked about."""
        asked = {query.video_id for query in self.queries.values()}
        self.tally.videos_without_query = len(self.videos) - len(asked)
        if not self.queries:
            raise DataError(f"{self.path}: no query was found ({self.tally})")
        if self.tally.clipped or self.tally.left_out:
            _log.info("%s: %s", self.path, self.tally)
        return Annotations(
            self.name,
            {key: duration for key, duration in self.videos.items() if key in asked},
            tuple(self.queries.values()),
            self.tally,
            {key: fps for key, fps in self.fps.items() if key in asked},
        )
