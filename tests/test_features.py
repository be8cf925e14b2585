"""Feature stores: what comes out is sound, what is not is named, and only what is asked is read."""

import json
import os
import pickle
import tracemalloc

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvg_lib.data.features import (
    ArrayStore,
    Concatenated,
    FeatureStore,
    FolderStore,
    HDF5Store,
    Normalised,
    Resampled,
    Strided,
    check_id,
    pack,
)
from tvg_lib.errors import DataError
from tvg_lib.moments import TimeGrid

BAD_IDS = ["../x", "a/b", "/etc/passwd", "..", ".", "", " ", "a\0b", "a\\b", "a\nb", 7, None]


def sequence(length: int, dim: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, dim)).astype(np.float32)


def as_npy(path, array):
    np.save(path.with_name(path.name + ".npy"), array)


def as_npz(path, array):
    np.savez(path.with_name(path.name + ".npz"), features=array)


def as_pt(path, array):
    torch.save(torch.from_numpy(array), path.with_name(path.name + ".pt"))


def folder_store(root, arrays, write=as_npy):
    for key, array in arrays.items():
        write(root / key, array)
    return FolderStore(root)


def hdf5_store(root, arrays):
    with h5py.File(root / "features.h5", "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return HDF5Store(root / "features.h5")


def packed_store(root, arrays):
    return pack(root / "packed", arrays.items(), np.float32)


def memory_store(root, arrays):
    return ArrayStore.of(arrays)


BUILDERS = {
    "npy": folder_store,
    "npz": lambda root, arrays: folder_store(root, arrays, as_npz),
    "pt": lambda root, arrays: folder_store(root, arrays, as_pt),
    "hdf5": hdf5_store,
    "packed": packed_store,
    "memory": memory_store,
}
every_store = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


# Every store ---------------------------------------------------------------------------------


@every_store
def test_a_store_gives_back_what_was_put_in(build, tmp_path):
    arrays = {"v1": sequence(5), "v2": sequence(1, seed=1), "with space.mp4": sequence(9, seed=2)}
    store = build(tmp_path, arrays)
    assert isinstance(store, FeatureStore)
    assert (store.dim, len(store), sorted(store)) == (3, 3, sorted(arrays))
    assert "v1" in store
    assert "v9" not in store
    for key, array in arrays.items():
        read = store[key]
        np.testing.assert_array_equal(read, array)
        assert read.dtype == np.float32
        assert read.flags["C_CONTIGUOUS"]
        read += 1  # a copy: writing to it changes nothing in the store
        np.testing.assert_array_equal(store[key], array)


@every_store
def test_a_missing_video_is_named(build, tmp_path):
    store = build(tmp_path, {"v1": sequence(5)})
    with pytest.raises(DataError, match=r"no features of 'v9' \(it holds 1 ids\)"):
        store["v9"]


@every_store
@pytest.mark.parametrize("key", BAD_IDS, ids=repr)
def test_ids_that_reach_elsewhere_find_nothing(build, tmp_path, key):
    np.save(tmp_path / "x.npy", sequence(2))
    (tmp_path / "inside").mkdir()
    store = build(tmp_path / "inside", {"v1": sequence(5)})
    with pytest.raises(DataError):
        store[key]


@every_store
def test_a_store_goes_to_another_process(build, tmp_path):
    array = sequence(4)
    store = build(tmp_path, {"v": array})
    store["v"]  # opened here already
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))["v"], array)


def _read_in_child(store, expected) -> bool:
    """Whether a forked child reads the right features."""
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(store["v"], expected) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@every_store
def test_a_store_survives_a_fork(build, tmp_path):
    array = sequence(4)
    store = build(tmp_path, {"v": array})
    np.testing.assert_array_equal(store["v"], array)
    assert _read_in_child(store, array)
    np.testing.assert_array_equal(store["v"], array)


@pytest.mark.parametrize("build", [folder_store, hdf5_store], ids=["npy", "hdf5"])
@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((0, 3), np.float32), "empty"),
        (np.zeros((3, 0), np.float32), "empty"),
        (np.zeros(3, np.float32), r"expected a \(T, C\) array, found shape \(3,\)"),
        (np.zeros((2, 2, 3), np.float32), r"found shape \(2, 2, 3\)"),
        (np.array([[1, np.nan, 2]]), "1 of 3 values are NaN or infinite, the first at clip 0, ch"),
        (np.array([[1, 2], [np.inf, 2.0]]), "NaN or infinite"),
        (np.array([[1e300, 2.0]]), "NaN or infinite"),  # infinite in float32
        (np.array([[True, False]]), "numbers"),
        (np.array([[1j, 2]]), "numbers"),
        (np.array([[b"a", b"b"]]), "numbers"),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else None,
)
def test_broken_arrays_are_named(build, array, complaint, tmp_path):
    with pytest.raises(DataError, match=complaint) as caught:
        build(tmp_path, {"v1": array})["v1"]
    assert "v1" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("build", [folder_store, hdf5_store], ids=["npy", "hdf5"])
def test_mixed_widths_are_named(build, tmp_path):
    store = build(tmp_path, {"a": sequence(5, 3), "b": sequence(5, 4)})
    store["a"]
    with pytest.raises(DataError, match=r"expected features of width 3, found 4 .*5, 4"):
        store["b"]


@pytest.mark.parametrize("kind", [FolderStore, HDF5Store])
def test_the_expected_width_may_be_declared(kind, tmp_path):
    folder_store(tmp_path, {"v": sequence(5)})
    hdf5_store(tmp_path, {"v": sequence(5)})
    store = kind(tmp_path if kind is FolderStore else tmp_path / "features.h5", dim=256)
    assert store.dim == 256
    with pytest.raises(DataError, match="expected features of width 256, found 3"):
        store["v"]


@pytest.mark.parametrize(
    "array",
    [sequence(4).astype(">f4"), np.asfortranarray(sequence(4)), np.arange(12).reshape(4, 3)],
)
def test_other_layouts_become_native_float32(array, tmp_path):
    read = folder_store(tmp_path, {"v": array})["v"]
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.dtype("float32")
    torch.from_numpy(read)  # refuses foreign byte orders


# Folders -------------------------------------------------------------------------------------


def test_a_folder_may_mix_forms_and_hold_other_things(tmp_path):
    as_npy(tmp_path / "a", sequence(2))
    as_pt(tmp_path / "b", sequence(3))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".c.npy").write_text("hidden")
    (tmp_path / "sub").mkdir()
    assert sorted(FolderStore(tmp_path)) == ["a", "b"]


def test_two_files_of_one_id_are_refused(tmp_path):
    as_npy(tmp_path / "a", sequence(2))
    as_pt(tmp_path / "a", sequence(2))
    with pytest.raises(DataError, match=r"'a' occurs twice, in 'a.npy' and 'a.pt'"):
        FolderStore(tmp_path)


def test_a_prefix_is_not_part_of_the_id(tmp_path):
    np.savez(tmp_path / "qid23.npz", last_hidden_state=sequence(6), pooler_output=sequence(1)[0])
    words = FolderStore(tmp_path, prefix="qid", array="last_hidden_state")
    assert list(words) == ["23"]
    assert words["23"].shape == (6, 3)
    sentences = FolderStore(tmp_path, prefix="qid", array="pooler_output", vectors=True)
    assert (sentences["23"].shape, sentences.dim) == ((1, 3), 3)
    with pytest.raises(DataError, match="choose with array="):
        FolderStore(tmp_path, prefix="qid")["23"]
    with pytest.raises(DataError, match="an array called 'tokens'"):
        FolderStore(tmp_path, prefix="qid", array="tokens")["23"]


def test_a_dict_of_tensors_is_chosen_from(tmp_path):
    content = {"clips": torch.ones(2, 3, dtype=torch.bfloat16), "ids": ["x"]}
    torch.save(content, tmp_path / "v.pt")
    np.testing.assert_array_equal(FolderStore(tmp_path, array="clips")["v"], np.ones((2, 3)))
    with pytest.raises(DataError, match="expected a tensor, found list"):
        FolderStore(tmp_path, array="ids")["v"]


def test_a_tensor_that_wants_gradients_is_read(tmp_path):
    torch.save(torch.ones(2, 3, requires_grad=True), tmp_path / "v.pt")
    assert FolderStore(tmp_path)["v"].shape == (2, 3)


@pytest.mark.parametrize("missing", ["nowhere", "empty", "file.npy"])
def test_a_folder_without_features_is_named(missing, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    as_npy(tmp_path / "file", sequence(2))
    with pytest.raises(DataError, match=missing):
        FolderStore(tmp_path / missing)


class Payload:
    """What a malicious pickle would run."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch remarks on the foreign pickle it refuses
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_pickles_are_refused_and_never_run(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    evil = np.empty((1, 1), dtype=object)
    evil[0, 0] = Payload()
    path = tmp_path / f"v{suffix}"
    if suffix == ".npy":
        np.save(path, evil, allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, evil, allow_pickle=True)
    else:
        torch.save(Payload(), path)
    with pytest.raises(DataError, match=str(path)):
        FolderStore(tmp_path, array="arr_0" if suffix == ".npz" else None)["v"]
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(DataError, match=str(path)):
        FolderStore(tmp_path)["v"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", [as_npy, as_npz, as_pt])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_named_or_read_whole(write, data, tmp_path):
    array = sequence(40)
    write(tmp_path / "v", array)
    (path,) = tmp_path.glob("v.*")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, min(200, len(content) - 1)))] ^= data.draw(
            st.integers(1, 255)
        )
    path.write_bytes(content)
    message, read = outcome(FolderStore(tmp_path))
    if read is None:
        assert str(path) in message
    else:  # damage that no format notices (a flipped bit in the data) still gives sound features
        assert read.ndim == 2
        assert np.isfinite(read).all()


def outcome(store):
    """The message of the error, or what was read."""
    try:
        return "", store["v"]
    except DataError as error:
        return str(error), None


def test_a_header_that_promises_too_much_allocates_nothing(tmp_path):
    with open(tmp_path / "v.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 512)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(64))
    with pytest.raises(DataError, match=r"v\.npy: cannot be read"):
        FolderStore(tmp_path)["v"]


def test_a_file_that_vanished_is_named(tmp_path):
    store = folder_store(tmp_path, {"v": sequence(3), "w": sequence(3)})
    (tmp_path / "w.npy").unlink()
    with pytest.raises(DataError, match=r"w\.npy"):
        store["w"]


# HDF5 ----------------------------------------------------------------------------------------


def test_groups_hold_an_array_by_name(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["v/clips"] = sequence(4)
        file["v/fps"] = 30
        file["w/fps"] = 30
    store = HDF5Store(tmp_path / "f.h5", array="clips", dim=3)
    np.testing.assert_array_equal(store["v"], sequence(4))
    with pytest.raises(DataError, match=r"\['w'\]: expected a group that holds 'clips'"):
        store["w"]
    with pytest.raises(DataError, match="expected an array, found Group"):
        HDF5Store(tmp_path / "f.h5", dim=3)["v"]
    with pytest.raises(DataError, match="expected an array"):
        HDF5Store(tmp_path / "f.h5", dim=3, array="fps")["v"]


def test_vectors_become_sequences_of_one(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["v"] = sequence(1)[0]
    store = HDF5Store(tmp_path / "f.h5", vectors=True)
    assert (store.dim, store["v"].shape) == (3, (1, 3))


def test_links_out_of_the_file_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["v"] = sequence(2)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["v"] = h5py.ExternalLink("secret.h5", "/v")
    with pytest.raises(DataError, match="link"):
        HDF5Store(tmp_path / "f.h5", dim=3)["v"]


@pytest.mark.parametrize("content", [b"", b"not HDF5", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_files_that_are_not_hdf5_are_named(content, tmp_path):
    (tmp_path / "f.h5").write_bytes(content)
    with pytest.raises(DataError, match=r"f\.h5: cannot be read as HDF5"):
        HDF5Store(tmp_path / "f.h5")["v"]


def test_an_hdf5_file_without_ids_and_none_at_all(tmp_path):
    h5py.File(tmp_path / "f.h5", "w").close()
    with pytest.raises(DataError, match="found none"):
        len(HDF5Store(tmp_path / "f.h5"))
    with pytest.raises(DataError, match="no such HDF5 file"):
        HDF5Store(tmp_path / "g.h5")


def test_a_closed_store_opens_again(tmp_path):
    store = hdf5_store(tmp_path, {"v": sequence(4)})
    store["v"]
    store.close()
    store.close()
    np.testing.assert_array_equal(store["v"], sequence(4))


# Packed --------------------------------------------------------------------------------------


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), dim=st.integers(1, 4))
def test_packing_and_opening_gives_the_same(lengths, dim, tmp_path):
    arrays = {f"v{i}": sequence(n, dim, seed=i) for i, n in enumerate(lengths)}
    store = pack(tmp_path / "p", arrays.items())
    assert list(store) == list(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(store[key], array.astype(np.float16).astype(np.float32))
    assert sorted(os.listdir(tmp_path / "p"))[0] == "index.json"
    assert len(os.listdir(tmp_path / "p")) == 2  # no remains of earlier packings


def test_the_rows_are_an_ordinary_npy_file(tmp_path):
    pack(tmp_path, {"a": sequence(3), "b": sequence(4, seed=1)}.items(), np.float32)
    (rows,) = tmp_path.glob("rows-*.npy")
    np.testing.assert_array_equal(np.load(rows), np.concatenate([sequence(3), sequence(4, seed=1)]))


def test_an_open_store_outlives_its_replacement(tmp_path):
    old = pack(tmp_path, {"a": sequence(3)}.items(), np.float32)
    new = pack(tmp_path, {"a": sequence(9, seed=1)}.items(), np.float32)
    np.testing.assert_array_equal(old["a"], sequence(3))
    np.testing.assert_array_equal(new["a"], sequence(9, seed=1))


def test_an_interrupted_packing_leaves_the_old_store(tmp_path):
    pack(tmp_path, {"a": sequence(3)}.items())
    before = sorted(os.listdir(tmp_path))

    def interrupted():
        yield "b", sequence(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, interrupted())
    assert sorted(os.listdir(tmp_path)) == before
    assert list(ArrayStore.open(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        ([], "no sequences"),
        ([("a", sequence(2)), ("a", sequence(2))], "'a' was given twice"),
        ([("../a", sequence(2))], "not a plain name"),
        ([("a", sequence(2)), ("b", sequence(2, 4))], "expected features of width 3, found 4"),
        ([("a", np.full((1, 2), np.nan))], "NaN"),
        ([("a", np.full((1, 2), 1e6))], "values up to 1e.06 do not fit into float16"),
        ([("a", np.zeros((0, 2)))], "empty"),
    ],
)
def test_what_cannot_be_packed_leaves_nothing_behind(items, complaint, tmp_path):
    with pytest.raises(DataError, match=complaint):
        pack(tmp_path / "p", items)
    assert os.listdir(tmp_path / "p") == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"lengths": [3, 5]}, "sum to 8, but there are 7 rows"),
        ({"lengths": [7]}, "2 ids but 1 lengths"),
        ({"lengths": [7, 0]}, "is empty"),
        ({"lengths": [7.0, 0]}, "not integers"),
        ({"ids": ["a", "a"]}, "'a' occurs twice"),
        ({"ids": ["a", "../b"]}, "not a plain name"),
        ({"rows": "../elsewhere.npy"}, "not a plain name"),
        ({"rows": "rows-0.npy"}, "rows-0.npy"),
        ({"rows": None}, "an id is a string"),
    ],
)
def test_an_index_that_does_not_belong_is_named(change, complaint, tmp_path):
    pack(tmp_path, {"a": sequence(3), "b": sequence(4)}.items())
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(DataError, match=complaint):
        ArrayStore.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ids": 3}', "\udcff"])
def test_a_broken_index_is_named(content, tmp_path):
    pack(tmp_path, {"a": sequence(3)}.items())
    (tmp_path / "index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"index\.json: not the index of a packed store"):
        ArrayStore.open(tmp_path)


def test_equal_data_have_equal_digests(tmp_path):
    arrays = {"a": sequence(3), "b": sequence(4)}
    packed = pack(tmp_path / "1", arrays.items(), np.float32)
    assert packed.digest == pack(tmp_path / "2", arrays.items(), np.float32).digest
    assert packed.digest == ArrayStore.of(arrays).digest
    moved = {"a": sequence(4), "b": sequence(3)}
    assert packed.digest != pack(tmp_path / "3", moved.items(), np.float32).digest


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((np.zeros(3), ["a"], [3]), "rows, C"),
        ((np.zeros((3, 2)), ["a", "a"], [1, 2]), "occurs twice"),
        ((np.zeros((3, 2)), ["a"], [2]), "sum to 2"),
    ],
)
def test_an_array_store_checks_its_parts(arguments, complaint):
    with pytest.raises(DataError, match=complaint):
        ArrayStore(*arguments)


def test_a_store_of_nothing_is_refused():
    with pytest.raises(DataError, match="no sequences"):
        ArrayStore.of({})
    with pytest.raises(DataError, match=r"\['b'\]: expected features of width 3"):
        ArrayStore.of({"a": sequence(2), "b": sequence(2, 4)})


# Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [folder_store, hdf5_store, packed_store])
def test_reading_one_video_does_not_read_the_others(build, tmp_path):
    large, small = 200_000, 10
    store = build(tmp_path, {"large": np.ones((large, 16), np.float32), "small": sequence(10, 16)})
    reopened = pickle.loads(pickle.dumps(store))
    reopened["small"]  # imports and indices, once
    tracemalloc.start()
    assert reopened["small"].shape == (small, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < large * 16 * 4


def test_packing_holds_one_sequence_at_a_time(tmp_path):
    def sequences():
        for i in range(50):
            yield f"v{i}", np.ones((10_000, 8), np.float32)

    tracemalloc.start()
    pack(tmp_path, sequences())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 < 50 * 10_000 * 8 * 4


# Views ---------------------------------------------------------------------------------------


def test_views_are_stores_over_the_same_ids():
    base = ArrayStore.of({"a": sequence(7), "b": sequence(2)})
    for view in (Strided(base, 2), Resampled(base, 4), Normalised(base), Concatenated([base])):
        assert isinstance(view, FeatureStore)
        assert (list(view), len(view), view.dim) == (["a", "b"], 2, 3)
        assert "a" in view
        assert "c" not in view
        assert view["a"].dtype == np.float32
        assert pickle.loads(pickle.dumps(view))["a"].shape == view["a"].shape
        with pytest.raises(DataError, match="'c'"):
            view["c"]


@given(length=st.integers(1, 40), factor=st.integers(1, 9))
def test_strided_keeps_every_factor_th_clip(length, factor):
    array = sequence(length)
    strided = Strided(ArrayStore.of({"v": array}), factor)["v"]
    np.testing.assert_array_equal(strided, array[np.arange(0, length, factor)])


def slow_resampling(array: np.ndarray, length: int) -> np.ndarray:
    """Straight lines between the middles of clips, sampled at the middles of the new ones."""
    factor = int(np.ceil(len(array) / length))
    fine = length * factor
    places = (np.arange(fine) + 0.5) * len(array) / fine - 0.5
    values = np.stack(
        [np.interp(places, np.arange(len(array)), column) for column in array.T], axis=1
    )
    return values.reshape(length, factor, -1).mean(axis=1)


@settings(max_examples=30)
@given(clips=st.integers(1, 60), length=st.integers(1, 30))
def test_resampling_against_a_slow_reference(clips, length):
    array = sequence(clips)
    resampled = Resampled(ArrayStore.of({"v": array}), length)
    assert resampled["v"].shape == (length, 3)
    np.testing.assert_allclose(resampled["v"], slow_resampling(array, length), atol=1e-5)
    grid = TimeGrid(16, 4, 24)
    assert resampled.grid("v", grid) == grid.resample(clips, length)


def test_resampling_to_the_same_length_changes_nothing():
    array = sequence(6)
    np.testing.assert_allclose(Resampled(ArrayStore.of({"v": array}), 6)["v"], array, atol=1e-6)


def test_normalised_rows_have_unit_length():
    array = np.array([[3, 4, 0], [0, 0, 0]], np.float32)
    expected = [[0.6, 0.8, 0], [0, 0, 0]]
    np.testing.assert_allclose(Normalised(ArrayStore.of({"v": array}))["v"], expected, atol=1e-6)


def test_concatenation_repeats_the_last_clip_of_the_shorter():
    rgb = ArrayStore.of({"v": sequence(4), "w": sequence(4), "only rgb": sequence(1)})
    flow = ArrayStore.of({"v": sequence(3, 2, seed=1), "w": sequence(2, 2)})
    both = Concatenated([rgb, flow])
    assert (both.dim, list(both), len(both)) == (5, ["v", "w"], 2)
    expected = np.concatenate([sequence(4), sequence(3, 2, seed=1)[[0, 1, 2, 2]]], axis=1)
    np.testing.assert_array_equal(both["v"], expected)
    with pytest.raises(DataError, match=r"'w': .* by more than 1: \[4, 2\] clips"):
        both["w"]
    assert Concatenated([rgb, flow], tolerance=2)["w"].shape == (4, 5)


@pytest.mark.parametrize(
    "view", [lambda s: Strided(s, 0), lambda s: Resampled(s, 0), lambda s: Concatenated([])]
)
def test_impossible_views_are_refused(view):
    with pytest.raises(DataError):
        view(ArrayStore.of({"v": sequence(3)}))


# Ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", BAD_IDS, ids=repr)
def test_bad_ids_are_refused_and_named(key):
    with pytest.raises(DataError, match=r"annotations\.json: .*id"):
        check_id(key, "annotations.json")


@given(st.text())
def test_an_accepted_id_stays_in_its_folder(key):
    try:
        check_id(key)
    except DataError:
        return
    assert os.path.normpath(os.path.join("/folder", key)) == f"/folder/{key}"
