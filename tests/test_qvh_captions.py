"""QVH-captions: download over a loopback server, reading, embedding and splicing."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tvg_lib.augmentation import with_caption_queries, with_paraphrases
from tvg_lib.data import download as downloading
from tvg_lib.data import qvh_captions as qvh
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.data.download import fetch
from tvg_lib.data.readers import read_qvhighlights
from tvg_lib.data.splicing import spliced
from tvg_lib.errors import DataError, GridMismatchError


class LetterCounts:
    """A sentence encoder that can be checked by hand."""

    name = "letter-counts"
    dim = 26

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        rows = np.stack([self._count(text) for text in sentences])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        return [np.stack([self._count(word) for word in text.split()]) for text in sentences]

    def _count(self, text: str) -> np.ndarray:
        return np.array([text.lower().count(chr(97 + i)) for i in range(26)], np.float32)


# --- a server that can break ----------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder with Range, as the real host does; can cut connections and drop Range."""

    cuts: int  # how many answers are cut after `cut_after` bytes
    cut_after = 1000
    ranges: list[str | None]
    ignore_range = False

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = 0 if asked is None or self.ignore_range else int(asked[len("bytes=") : -1])
        if start >= len(data) > 0 and start:
            self.send_error(416)
            return
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).cuts > 0:
            type(self).cuts -= 1
            body = body[: self.cut_after]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, type[Handler]]]:
    """A folder, the address it is served at, and the knobs of the server."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Knobs", (Handler,), {"cuts": 0, "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_fetch_checks_and_keeps(served: tuple, tmp_path: Path) -> None:
    folder, host, handler = served
    data = bytes(range(256)) * 20
    (folder / "file").write_bytes(data)
    right = hashlib.sha256(data).hexdigest()
    target = tmp_path / "deep" / "file"
    pieces: list[int] = []
    fetch(f"{host}/file", target, right, progress=pieces.append)
    assert target.read_bytes() == data
    assert sum(pieces) == len(data)
    fetch(f"{host}/file", target, right)
    assert len(handler.ranges) == 1  # the second call asked nothing
    target.write_bytes(b"damaged")
    fetch(f"{host}/file", target, right)
    assert target.read_bytes() == data


@pytest.mark.parametrize("ignore_range", [False, True])
def test_fetch_goes_on_after_a_broken_connection(
    served: tuple, tmp_path: Path, ignore_range: bool
) -> None:
    folder, host, handler = served
    data = np.random.default_rng(0).bytes(2500)
    (folder / "file").write_bytes(data)
    handler.cuts, handler.ignore_range = 2, ignore_range
    fetch(f"{host}/file", tmp_path / "file", hashlib.sha256(data).hexdigest(), pause=0)
    assert (tmp_path / "file").read_bytes() == data
    assert handler.ranges[0] is None
    assert handler.ranges[1] == "bytes=1000-"
    assert handler.ranges[2] == ("bytes=1000-" if ignore_range else "bytes=2000-")


def test_fetch_gives_up_and_a_later_run_goes_on(served: tuple, tmp_path: Path) -> None:
    folder, host, handler = served
    data = np.random.default_rng(0).bytes(6000)
    (folder / "file").write_bytes(data)
    handler.cuts = downloading.ATTEMPTS
    target = tmp_path / "file"
    with pytest.raises(DataError, match="broke 4 times"):
        fetch(f"{host}/file", target, hashlib.sha256(data).hexdigest(), pause=0)
    assert not target.exists()
    fetch(f"{host}/file", target, hashlib.sha256(data).hexdigest(), pause=0)
    assert handler.ranges[-1] == "bytes=4000-"
    assert target.read_bytes() == data


def test_fetch_refuses_what_is_not_the_file(served: tuple, tmp_path: Path) -> None:
    folder, host, _ = served
    (folder / "file").write_bytes(b"something else")
    target = tmp_path / "file"
    expected = hashlib.sha256(b"the file").hexdigest()
    with pytest.raises(DataError, match="expected the SHA-256"):
        fetch(f"{host}/file", target, expected, pause=0)
    assert list(tmp_path.glob("file*")) == []
    with pytest.raises(DataError, match="404"):
        fetch(f"{host}/missing", target, pause=0)
    with pytest.raises(DataError, match="broke 4 times"):
        fetch("http://127.0.0.1:9/file", target, pause=0)


def test_a_part_that_is_too_long_is_thrown_away(served: tuple, tmp_path: Path) -> None:
    folder, host, _ = served
    (folder / "file").write_bytes(b"short")
    (tmp_path / "file.part").write_bytes(b"the rest of something longer")
    fetch(f"{host}/file", tmp_path / "file", hashlib.sha256(b"short").hexdigest(), pause=0)
    assert (tmp_path / "file").read_bytes() == b"short"


# --- a small QVH-captions -------------------------------------------------------------------------

VIDEOS = {"a_0.0_12.0": 6, "b_0.0_12.0": 6, "-c_0.0_10.0": 4}  # clips; the last lacks its fifth
DURATIONS = {"a_0.0_12.0": 12, "b_0.0_12.0": 12, "-c_0.0_10.0": 10}
QUERIES = [
    (1, "a_0.0_12.0", "a dog barks", [[2, 6]]),
    (2, "a_0.0_12.0", "rain", [[0, 2], [8, 12]]),
    (3, "b_0.0_12.0", "two cats", [[4, 12]]),
    (4, "-c_0.0_10.0", "the end", [[6, 10]]),
]


def caption_lines(video: str, clips: int) -> bytes:
    rows = [
        {"moment": i, "description": f"{video[:2]} picture {'abc'[i % 3]} "} for i in range(clips)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_split(root: Path, split: str) -> None:
    rows = [
        {
            "qid": qid,
            "query": text,
            "vid": video,
            "duration": DURATIONS[video],
            "relevant_windows": moments,
            "relevant_clip_ids": [moments[0][0] // 2],
            "saliency_scores": [[1, 2, 4]],
        }
        for qid, video, text, moments in QUERIES
    ]
    (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wordings = [
        {"qid": row["qid"], "rephrased_query": [f"{row['query']} again {n}" for n in "uvwxy"]}
        for row in rows
    ]
    (root / f"paraphrases_{split}.jsonl").write_text("\n".join(map(json.dumps, wordings)))
    with zipfile.ZipFile(root / f"captions_{split}.zip", "w") as archive:
        archive.writestr(f"{split}/", "")
        for video, clips in VIDEOS.items():
            archive.writestr(f"{split}/{video}.jsonl", caption_lines(video, clips))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Raw files of both splits in a folder of their own, and an empty cache."""
    monkeypatch.setenv("TVG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TVG_DATA", raising=False)
    folder = tmp_path / "raw"
    folder.mkdir()
    for split in qvh.SPLITS:
        write_split(folder, split)
    return folder


@pytest.fixture
def dataset(root: Path) -> GroundingDataset:
    return qvh.load("val", LetterCounts(), root)


def test_load(dataset: GroundingDataset, root: Path) -> None:
    dataset.check()
    encoder = LetterCounts()
    texts = qvh.captions("val", root)
    assert texts["a_0.0_12.0"][4] == "a_ picture b"
    for video in dataset.videos.values():
        assert video.duration == DURATIONS[video.id]
        clips = dataset.video_features[video.id]
        assert clips.dtype == np.float32
        np.testing.assert_allclose(clips, encoder.encode(texts[video.id]), atol=1e-3)
    assert [query.id for query in dataset.queries] == ["1", "2", "3", "4"]
    for query, (_, video_id, text, moments) in zip(dataset.queries, QUERIES, strict=True):
        assert (query.video_id, query.text) == (video_id, text)
        np.testing.assert_array_equal(query.moments, moments)
        words = encoder.encode_tokens([text])[0]
        np.testing.assert_allclose(dataset.text_features[query.id], words, atol=1e-3)
        whole = encoder.encode([text])
        np.testing.assert_allclose(dataset.sentence_features[query.id], whole, atol=1e-3)
    assert dataset.queries[0].saliency.clips.tolist() == [1]
    assert dataset.queries[0].saliency.scores.tolist() == [[1, 2, 4]]


def test_a_folder_is_as_good_as_a_zip(root: Path) -> None:
    before = qvh.captions("val", root), qvh.dataset_fingerprint("val", root)
    archive = root / "captions_val.zip"
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist()[1:]:
            target = root / "captions_val" / Path(name).name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(opened.read(name))
    archive.unlink()
    qvh._read_captions.cache_clear()
    assert qvh.available("val", root)
    assert (qvh.captions("val", root), qvh.dataset_fingerprint("val", root)) == before


def test_fingerprint_sees_every_file(root: Path) -> None:
    prints = {qvh.dataset_fingerprint("val", root)}
    for name in ("val.jsonl", "paraphrases_val.jsonl"):
        with (root / name).open("a") as file:
            file.write("\n")
        prints.add(qvh.dataset_fingerprint("val", root))
    with zipfile.ZipFile(root / "captions_val.zip", "a") as archive:
        archive.writestr("val/extra.jsonl", caption_lines("extra", 2))
    qvh._read_captions.cache_clear()
    prints.add(qvh.dataset_fingerprint("val", root))
    assert len(prints) == 4


def test_paraphrases_are_queries_of_their_own(root: Path, dataset: GroundingDataset) -> None:
    more = with_paraphrases(dataset, qvh.paraphrases("val", root), LetterCounts())
    assert len(more) == 6 * len(dataset)
    assert [query.id for query in more.queries_of("b_0.0_12.0")] == [
        "3",
        *(f"3.{n}" for n in range(1, 6)),
    ]
    query = more.query("2.4")
    assert query.text == "rain again x"
    np.testing.assert_array_equal(query.moments, dataset.query("2").moments)
    words = LetterCounts().encode_tokens([query.text])[0]
    np.testing.assert_allclose(more.text_features["2.4"], words, atol=1e-3)
    np.testing.assert_array_equal(more.text_features["2"], dataset.text_features["2"])
    assert len(more.sentence_features) == len(set(more.sentence_features)) == 24


def test_captions_are_asked_as_queries(root: Path, dataset: GroundingDataset) -> None:
    captions = qvh.captions("val", root)
    more = with_caption_queries(dataset, captions, per_video=2, encoder=LetterCounts())
    added = more.queries[len(dataset) :]
    assert len(added) == 2 * len(dataset.videos)
    for query in added:
        video_id, clip = query.id.split("#")
        start, end = query.moments[0]
        assert query.video_id == video_id
        assert query.text == captions[video_id][int(clip)]
        assert start <= 2 * int(clip) < end <= dataset.videos[video_id].duration
        assert len(more.text_features[query.id]) == len(query.text.split())
    again = with_caption_queries(dataset, captions, per_video=2, encoder=LetterCounts())
    assert [query.id for query in again.queries] == [query.id for query in more.queries]
    with pytest.raises(DataError, match="no captions of video"):
        with_caption_queries(dataset, {}, per_video=1, encoder=LetterCounts())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"not json", "line 1: not valid JSON"),
        (b"[1, 2]", "line 1: expected an object"),
        (b'{"moment": 0, "description": " "}', "expected {"),
        (b'{"moment": 1, "description": "x"}', "without a gap"),
        (b'{"moment": 0, "description": "x"}\n' * 2, "two captions"),
        (b"", "without a gap"),
    ],
)
def test_bad_captions_are_named(root: Path, lines: bytes, message: str) -> None:
    with zipfile.ZipFile(root / "captions_val.zip", "a") as archive:
        archive.writestr("val/bad.jsonl", lines)
    qvh._read_captions.cache_clear()
    with pytest.raises(DataError, match=r"bad\.jsonl") as caught:
        qvh.captions("val", root)
    assert message in str(caught.value)


def test_bad_files_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'train'"):
        qvh.load("train", LetterCounts(), root)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="TVG_DATA"):
        qvh.load("val", LetterCounts(), tmp_path / "nowhere")
    lines = (root / "test.jsonl").read_text().splitlines()
    (root / "test.jsonl").write_text(lines[0] + "\n" + lines[1].replace("12", "13", 1))
    with pytest.raises(DataError):
        qvh.load("test", LetterCounts(), root)
    (root / "test.jsonl").write_text('{"qid": 1}')
    with pytest.raises(DataError, match="vid"):
        qvh.load("test", LetterCounts(), root)
    (root / "captions_val.zip").write_bytes(b"no zip")
    qvh._read_captions.cache_clear()
    with pytest.raises(DataError, match="not a readable zip"):
        qvh.captions("val", root)


def test_captions_must_fit_the_duration(root: Path) -> None:
    text = (root / "val.jsonl").read_text().replace('"duration": 10', '"duration": 60')
    (root / "val.jsonl").write_text(text)
    with pytest.raises(GridMismatchError, match="captions of -c"):
        qvh.load("val", LetterCounts(), root)


# --- QVH-long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("videos_per_film", [1, 2, 3, 5])
def test_a_film_is_its_videos_end_to_end(dataset: GroundingDataset, videos_per_film: int) -> None:
    films = spliced(dataset, videos_per_film, seed=3)
    films.check()
    assert len(films) == len(dataset)
    assert len(films.videos) == -(-3 // videos_per_film)
    used = [part.video_id for parts in films.video_features.films.values() for part in parts]
    assert sorted(used) == sorted(dataset.videos)
    for name, parts in films.video_features.films.items():
        rows = []
        for part in parts:
            clips = dataset.video_features[part.video_id]
            wanted = {"a_0.0_12.0": 6, "b_0.0_12.0": 6, "-c_0.0_10.0": 5}[part.video_id]
            assert part.first_clip == len(rows)
            rows += [clips[min(i, len(clips) - 1)] for i in range(wanted)]
        np.testing.assert_array_equal(films.video_features[name], rows)
        assert films.videos[name].duration == 2 * len(rows)


def test_moments_move_with_their_video(dataset: GroundingDataset) -> None:
    films = spliced(dataset, 3, seed=0)
    first = {p.video_id: p.first_clip for p in films.video_features.films["film-0000"]}
    assert sorted(first.values())[0] == 0
    for before, after in zip(dataset.queries, films.queries, strict=True):
        shift = first[before.video_id]
        assert after.video_id == "film-0000"
        np.testing.assert_array_equal(after.moments, before.moments + 2 * shift)
        np.testing.assert_array_equal(after.saliency.clips, before.saliency.clips + shift)
        # The clips under the moved moment are the clips under the moment.
        clip = int(before.moments[0, 0] // 2)
        np.testing.assert_array_equal(
            films.video_features[after.video_id][clip + shift],
            dataset.video_features[before.video_id][clip],
        )


def test_films_are_decided_by_the_seed(dataset: GroundingDataset) -> None:
    films = [spliced(dataset, 2, seed).video_features.films for seed in (0, 0, *range(1, 9))]
    assert films[0] == films[1]
    assert any(other != films[0] for other in films[2:])


def test_films_are_not_copied(dataset: GroundingDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    films = spliced(dataset, 2, seed=0)
    read: list[str] = []
    original = type(dataset.video_features).__getitem__

    def spy(self: object, key: str) -> np.ndarray:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(type(dataset.video_features), "__getitem__", spy)
    films.video_features["film-0000"]
    assert read == [part.video_id for part in films.video_features.films["film-0000"]]


def test_impossible_films_are_refused(dataset: GroundingDataset) -> None:
    with pytest.raises(DataError, match="at least one video"):
        spliced(dataset, 0, seed=0)
    with pytest.raises(DataError, match="no film"):
        spliced(dataset, 2, seed=0).video_features["film-0009"]


# --- download -------------------------------------------------------------------------------------


def publish(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the small data set at the published addresses, with its own checksums."""
    sources = []
    for source in qvh.SOURCES:
        data = (root / source.name).read_bytes()
        target = folder / source.address
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        sources.append(qvh.Source(source.name, source.address, digest))
    files = {f"{video}.jsonl": caption_lines(video, clips) for video, clips in VIDEOS.items()}
    single = folder / qvh.TEST_CAPTIONS.address
    single.mkdir(parents=True)
    for name, data in files.items():
        (single / name).write_bytes(data)
    captions = qvh.Source("captions_test", qvh.TEST_CAPTIONS.address, qvh.contents_sha256(files))
    monkeypatch.setattr(qvh, "SOURCES", tuple(sources))
    monkeypatch.setattr(qvh, "TEST_CAPTIONS", captions)


def test_download(
    served: tuple, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, host, handler = served
    publish(folder, root, monkeypatch)
    handler.cuts, handler.cut_after = 3, 50
    got = qvh.download(host=host, pause=0)
    assert got == tmp_path / "cache" / "qvhighlights" == qvh.folder()
    assert all(qvh.available(split) for split in qvh.SPLITS)
    assert (got / "captions_test" / "-c_0.0_10.0.jsonl").exists()
    assert not list(got.rglob("*.part*"))
    for split in qvh.SPLITS:
        assert qvh.dataset_fingerprint(split) == qvh.dataset_fingerprint(split, root)
    asked = len(handler.ranges)
    qvh.download(host=host, pause=0)
    qvh.download(got, host=host, pause=0)
    assert len(handler.ranges) == asked


def test_an_interrupted_download_goes_on(
    served: tuple, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, host, handler = served
    publish(folder, root, monkeypatch)
    hidden = folder / qvh.TEST_CAPTIONS.address / "-c_0.0_10.0.jsonl"
    data = hidden.read_bytes()
    hidden.unlink()
    with pytest.raises(DataError, match="404"):
        qvh.download(tmp_path / "new", host=host, pause=0)
    assert not qvh.available("test", tmp_path / "new")
    # Which of the other files had come before the error ended the download is chance.
    kept = {path.name for path in (tmp_path / "new").rglob("*.jsonl")}
    missing = {f"{video}.jsonl" for video in VIDEOS} - kept
    assert hidden.name in missing
    hidden.write_bytes(data)
    handler.ranges.clear()
    qvh.download(tmp_path / "new", host=host, pause=0)
    assert len(handler.ranges) == len(missing)  # and nothing else
    assert qvh.available("test", tmp_path / "new")


def test_wrong_captions_are_not_kept(
    served: tuple, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, host, _ = served
    publish(folder, root, monkeypatch)
    (folder / qvh.TEST_CAPTIONS.address / "a_0.0_12.0.jsonl").write_bytes(caption_lines("z", 6))
    with pytest.raises(DataError, match="expected contents"):
        qvh.download(tmp_path / "new", host=host, pause=0)
    assert not qvh.available("test", tmp_path / "new")
    assert list((tmp_path / "new" / "captions_test.parts").iterdir()) == []


def test_placed_data_are_taken_without_a_network(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = tmp_path / "placed"
    placed.mkdir()
    root.rename(placed / "qvhighlights")
    monkeypatch.setenv("TVG_DATA", str(placed))
    assert qvh.download(host="http://127.0.0.1:9") == (placed / "qvhighlights").resolve()


# --- the real files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "videos", "queries"), [("val", 1519, 1550), ("test", 1529, 1542)]
)
def test_real_files(tvg_data: Path, split: qvh.Split, videos: int, queries: int) -> None:
    root = tvg_data / "qvhighlights"
    texts = qvh.captions(split, root)
    annotations = read_qvhighlights(root / f"{split}.jsonl", strict=True)
    found, durations = annotations.queries, annotations.videos
    assert len(texts) == len(durations) == videos
    assert len(found) == queries
    assert {query.video_id for query in found} == set(texts)
    for key, duration in durations.items():
        qvh.QVHIGHLIGHTS_2S.check(len(texts[key]), duration, key)
        assert abs(len(texts[key]) - duration / 2) <= 1
    assert max(query.moments[:, 1].max() - durations[query.video_id] for query in found) <= 0
    wordings = qvh.paraphrases(split, root)
    assert set(wordings) == {query.id for query in found}
    assert {len(texts) for texts in wordings.values()} == {5}


def test_real_files_are_the_published_ones(tvg_data: Path) -> None:
    root = tvg_data / "qvhighlights"
    for source in qvh.SOURCES:
        assert downloading.file_sha256(root / source.name) == source.sha256, source.name
    assert qvh.contents_sha256(qvh._caption_files(root, "test")) == qvh.TEST_CAPTIONS.sha256


def test_three_real_videos(tvg_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few real clips and queries through the real encoder."""
    from tvg_lib.encoders.sentence import MiniLM, find_minilm

    pytest.importorskip("sentence_transformers")
    if not Path(find_minilm()).is_dir():
        pytest.skip("the weights of all-MiniLM-L6-v2 are not on this machine")
    monkeypatch.setenv("TVG_CACHE", str(tmp_path))
    source = tvg_data / "qvhighlights"
    rows = [json.loads(line) for line in (source / "val.jsonl").read_text().splitlines()[:3]]
    texts = qvh.captions("val", source)
    small = tmp_path / "small"
    (small / "captions_val").mkdir(parents=True)
    for row in rows:  # eight captions of each video, its duration cut to match
        kept = [{"moment": i, "description": t} for i, t in enumerate(texts[row["vid"]][:8])]
        lines = "\n".join(map(json.dumps, kept))
        (small / "captions_val" / f"{row['vid']}.jsonl").write_text(lines)
        row |= {"duration": 16, "relevant_windows": [[2, 8]], "relevant_clip_ids": [1]}
        row["saliency_scores"] = row["saliency_scores"][:1]
    (small / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = qvh.load("val", MiniLM(), small)
    dataset.check()
    for query in dataset.queries:
        clips = dataset.video_features[query.video_id]
        assert clips.shape == (8, 384)
        np.testing.assert_allclose(np.linalg.norm(clips, axis=1), 1, atol=2e-3)
        assert dataset.text_features[query.id].shape[1] == 384
