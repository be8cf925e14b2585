"""Feature stores: (T, C) float32 sequences by id, read when asked for.

    FolderStore     one .npy, .npz or .pt file per id             what most projects publish
    HDF5Store       one HDF5 file, one array per id
    ArrayStore      all sequences end to end in one array         what `pack` writes, memory-mapped

    Strided, Resampled, Normalised, Concatenated                  views of other stores

Reading one id never reads another's data. Whatever the store, a sequence that comes out is (T, C),
float32, contiguous, writable, not empty, finite and of the store's width; anything else is a
`DataError` that names the file or id, what was expected and what was found. Pickles are refused.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.nn import functional as F

from tvg_lib import paths
from tvg_lib.errors import DataError
from tvg_lib.moments import TimeGrid


@runtime_checkable
class FeatureStore(Protocol):
    """A read-only mapping from ids to feature sequences."""

    @property
    def dim(self) -> int:
        """Width C of every sequence."""
        ...

    def __getitem__(self, key: str) -> np.ndarray:
        """(T, C) float32, T >= 1, finite; a `DataError` names the id and the file otherwise."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...


def check_id(key: object, where: str = "") -> str:
    """The id itself, if it can safely be a file name: ids come from files written by others.

    Args:
        key: the id.
        where: named in the message, e.g. the file the id was read from.

    Raises:
        DataError: not a string, empty, or able to reach outside its folder (a path separator, `.`
            or `..`, a control character such as NUL).
    """
    place = f"{where}: " if where else ""
    if not isinstance(key, str):
        raise DataError(f"{place}an id is a string, found {type(key).__name__} {key!r}")
    if not key.strip():
        raise DataError(f"{place}an id may not be empty, found {key!r}")
    if key in (".", "..") or any(c in "/\\" or ord(c) < 32 or ord(c) == 127 for c in key):
        raise DataError(
            f"{place}the id {key!r} is not a plain name: path separators, '.', '..' and control "
            "characters are refused"
        )
    return key


def check_sequence(array: np.ndarray, where: str, dim: int | None) -> np.ndarray:
    """A sequence as float32, if it is one.

    Args:
        array: what was read.
        where: file and id, for the message.
        dim: expected width C, None to accept any.

    Returns:
        (T, C) float32, contiguous, a copy that may be written to.

    Raises:
        DataError: not numbers, not of rank 2, empty, of another width, or not finite in float32.
    """
    if array.dtype.kind not in "fiu":
        raise DataError(f"{where}: expected an array of numbers, found dtype {array.dtype}")
    if array.ndim != 2:
        raise DataError(f"{where}: expected a (T, C) array, found shape {tuple(array.shape)}")
    if 0 in array.shape:
        raise DataError(f"{where}: the array is empty, shape {tuple(array.shape)}")
    if dim is not None and array.shape[1] != dim:
        raise DataError(
            f"{where}: expected features of width {dim}, found {array.shape[1]} "
            f"(shape {tuple(array.shape)})"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused below
        sequence = np.array(array, dtype=np.float32, order="C")
    finite = np.isfinite(sequence)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise DataError(
            f"{where}: {int((~finite).sum())} of {finite.size} values are NaN or infinite, the "
            f"first at clip {row}, channel {column}"
        )
    return sequence


def _width(shape: tuple[int, ...], where: str) -> int:
    if len(shape) != 2:
        raise DataError(f"{where}: expected a (T, C) array, found shape {tuple(shape)}")
    return int(shape[1])


def _missing(key: object, store: str, count: int) -> DataError:
    return DataError(f"{store} has no features of {key!r} (it holds {count} ids)")


def _load_tensor(path: Path, array: str | None) -> np.ndarray:
    """The tensor of a .pt file, or the one called `array` in a dict of tensors."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        content = _choose(content, array, path)
    if not isinstance(content, torch.Tensor):
        raise DataError(f"{path}: expected a tensor, found {type(content).__name__}")
    content = content.detach()
    return (content.float() if content.is_floating_point() else content).numpy()


def _choose(arrays: Mapping[str, Any], array: str | None, path: Path | str) -> Any:
    """The array called `array`; without a name, the only one there is."""
    names = list(arrays)
    if array is None and len(names) == 1:
        return arrays[names[0]]
    if array not in names:
        wanted = "one array" if array is None else f"an array called {array!r}"
        raise DataError(f"{path}: expected {wanted}, found {names[:8]}; choose with array=")
    return arrays[array]


def read_array(path: Path, array: str | None = None) -> np.ndarray:
    """One array of a .npy (memory-mapped), .npz or .pt file; pickled objects are never loaded.

    Raises:
        DataError: names the file, if it is missing, truncated, of another kind or a pickle.
    """
    try:
        if path.suffix == ".pt":
            return _load_tensor(path, array)
        # Mapping a .npy first compares its header with its size: a truncated file is found before
        # anything is allocated.
        content = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return _choose(content, array, path)
    except DataError:
        raise
    except Exception as error:  # decoders raise a dozen unrelated types on damaged bytes
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as {path.suffix} features: {detail}") from error


class FolderStore:
    """One file per id in one folder: `<prefix><id>.npy`, `.npz` or `.pt`.

    The folder is listed once, at construction; a file is read when its id is asked for.

    Args:
        folder: where the files are; sub-folders are not searched.
        dim: expected width; None takes that of the first file.
        prefix: what stands before the id in the file name, e.g. "qid".
        array: name of the array in files that hold several (.npz, .pt with a dict).
        vectors: files hold one (C,) vector, read as (1, C).

    Raises:
        DataError: no such folder, no feature files in it, or two files of one id.
    """

    SUFFIXES = (".npy", ".npz", ".pt")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        dim: int | None = None,
        prefix: str = "",
        array: str | None = None,
        vectors: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.array = array
        self.vectors = vectors
        self._dim = dim
        self._names: dict[str, str] = {}
        try:
            names = sorted(os.listdir(self.folder))
        except OSError as error:
            raise DataError(f"{self.folder}: not a readable folder of features: {error}") from error
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix not in self.SUFFIXES or not stem.startswith(prefix) or name.startswith("."):
                continue
            key = stem[len(prefix) :]
            if key in self._names:
                raise DataError(
                    f"{self.folder}: the id {key!r} occurs twice, in {self._names[key]!r} and "
                    f"{name!r}"
                )
            self._names[key] = name
        if not self._names:
            raise DataError(
                f"{self.folder}: expected files {prefix}<id>{{{','.join(self.SUFFIXES)}}}, found "
                f"none among {len(names)} entries"
            )

    @property
    def dim(self) -> int:
        if self._dim is None:
            key = next(iter(self._names))
            self._dim = _width(self._read(key).shape, str(self.folder / self._names[key]))
        return self._dim

    def _read(self, key: str) -> np.ndarray:
        array = read_array(self.folder / self._names[key], self.array)
        return array[None] if self.vectors and array.ndim == 1 else array

    def __getitem__(self, key: str) -> np.ndarray:
        check_id(key, str(self.folder))
        if key not in self._names:
            raise _missing(key, str(self.folder), len(self))
        return check_sequence(self._read(key), str(self.folder / self._names[key]), self.dim)

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"FolderStore({str(self.folder)!r}: {len(self)} ids)"


class HDF5Store:
    """One HDF5 file with one array per id, or one group per id that holds an array.

    The file is opened at the first read and once in every process, so that a store can be handed to
    the workers of a loader, forked or spawned. Links to other files are not followed.

    Args:
        path: the file.
        dim: expected width; None takes that of the first id.
        array: name of the array in the group of each id; None where ids are arrays themselves.
        vectors: arrays are single (C,) vectors, read as (1, C).

    Raises:
        DataError: no such file (at construction), not an HDF5 file or no ids (at the first use).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dim: int | None = None,
        array: str | None = None,
        vectors: bool = False,
    ) -> None:
        self.path = Path(path)
        self.array = array
        self.vectors = vectors
        self._dim = dim
        self._handle: Any = None
        self._process = -1
        self._ids: dict[str, None] = {}
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such HDF5 file")

    def _file(self) -> Any:
        # A handle that was open before a fork shares its file position with the parent: open anew.
        if self._handle is None or self._process != os.getpid():
            import h5py

            try:
                self._handle = h5py.File(self.path, "r")
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read as HDF5: {error}") from error
            self._process = os.getpid()
        return self._handle

    def _index(self) -> dict[str, None]:
        if not self._ids:
            self._ids = dict.fromkeys(self._file())
            if not self._ids:
                raise DataError(f"{self.path}: expected one array per id, found none")
        return self._ids

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._handle is not None and self._process == os.getpid():
            self._handle.close()
        self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_process": -1}

    @property
    def dim(self) -> int:
        if self._dim is None:
            key = next(iter(self._index()))
            array = self._array(key)
            shape = (1, *array.shape) if self.vectors and array.ndim == 1 else array.shape
            self._dim = _width(shape, f"{self.path}[{key!r}]")
        return self._dim

    def _array(self, key: str) -> Any:
        """The h5py array of an id; nothing is read yet."""
        import h5py

        where, item = f"{self.path}[{key!r}]", self._file()
        for name in (key,) if self.array is None else (key, self.array):
            if not isinstance(item, h5py.Group) or name not in item:
                raise DataError(f"{where}: expected a group that holds {name!r}")
            if not isinstance(item.get(name, getlink=True), h5py.HardLink):
                raise DataError(f"{where}: {name!r} is a link, which is not followed")
            item = item[name]
        if not isinstance(item, h5py.Dataset) or item.shape in (None, ()):
            raise DataError(f"{where}: expected an array, found {type(item).__name__}")
        return item

    def __getitem__(self, key: str) -> np.ndarray:
        check_id(key, str(self.path))
        if key not in self._index():
            raise _missing(key, str(self.path), len(self))
        where = f"{self.path}[{key!r}]"
        try:
            array = np.asarray(self._array(key)[...])
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error}") from error
        array = array[None] if self.vectors and array.ndim == 1 else array
        return check_sequence(array, where, self.dim)

    def __contains__(self, key: object) -> bool:
        return key in self._index()

    def __iter__(self) -> Iterator[str]:
        return iter(self._index())

    def __len__(self) -> int:
        return len(self._index())

    def __repr__(self) -> str:
        return f"HDF5Store({str(self.path)!r})"


class ArrayStore:
    """All sequences end to end in one (sum of T, C) array, in memory or memory-mapped.

    Args:
        rows: (sum of T, C) the sequences in the order of `ids`.
        ids: one per sequence.
        lengths: T of each sequence.
        name: for messages.

    Raises:
        DataError: duplicate ids, an empty sequence, or lengths that do not add up to the rows.
    """

    INDEX = "index.json"

    def __init__(
        self, rows: np.ndarray, ids: Sequence[str], lengths: Sequence[int], name: str = "ArrayStore"
    ) -> None:
        self.name = name
        self.folder: Path | None = None
        if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype.kind not in "fiu":
            raise DataError(
                f"{name}: expected a (rows, C) array of numbers, found shape {tuple(rows.shape)}, "
                f"dtype {rows.dtype}"
            )
        if len(ids) != len(lengths):
            raise DataError(f"{name}: {len(ids)} ids but {len(lengths)} lengths")
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        self._spans: dict[str, tuple[int, int]] = {}
        for key, length, end in zip(ids, lengths, ends, strict=True):
            check_id(key, name)
            if key in self._spans:
                raise DataError(f"{name}: the id {key!r} occurs twice")
            if length < 1:
                raise DataError(f"{name}: the sequence of {key!r} is empty, length {length}")
            self._spans[key] = (int(end - length), int(end))
        total = int(ends[-1]) if len(ends) else 0
        if total != len(rows):
            raise DataError(f"{name}: the lengths sum to {total}, but there are {len(rows)} rows")
        self._rows = rows
        self._sha256: str | None = None

    @classmethod
    def of(cls, sequences: Mapping[str, np.ndarray], name: str = "ArrayStore") -> "ArrayStore":
        """A store in memory, from (T, C) arrays by id.

        Raises:
            DataError: no sequences, or one that `check_sequence` refuses.
        """
        if not sequences:
            raise DataError(f"{name}: no sequences were given")
        checked: list[np.ndarray] = []
        for key, array in sequences.items():
            dim = checked[0].shape[1] if checked else None
            checked.append(check_sequence(np.asarray(array), f"{name}[{key!r}]", dim))
        return cls(np.concatenate(checked), list(sequences), [len(c) for c in checked], name)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "ArrayStore":
        """The store that `pack` wrote, memory-mapped: only what is asked for is read.

        Raises:
            DataError: no store there, or its files do not belong together.
        """
        folder = Path(folder)
        path = folder / cls.INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            ids, lengths, rows_file = index["ids"], index["lengths"], index["rows"]
            sha256 = str(index["sha256"])
            if not all(type(length) is int for length in lengths):
                raise TypeError("lengths are not integers")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not the index of a packed store: {error!r}") from error
        rows = read_array(folder / check_id(rows_file, str(path)))
        store = cls(rows, ids, lengths, name=str(folder))
        store.folder = folder
        store._sha256 = sha256
        return store

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of rows, ids and lengths: equal for equal data, for run records."""
        if self._sha256 is None:
            self._sha256 = hashlib.sha256(np.ascontiguousarray(self._rows)).hexdigest()
        spans = json.dumps([self._sha256, str(self._rows.dtype), list(self._spans.items())])
        return hashlib.sha256(spans.encode()).hexdigest()

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._spans:
            raise _missing(key, self.name, len(self))
        first, last = self._spans[key]
        return check_sequence(self._rows[first:last], f"{self.name}[{key!r}]", self.dim)

    def __contains__(self, key: object) -> bool:
        return key in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:  # a worker maps the file itself: nothing is copied to it
            return type(self).open, (self.folder,)
        lengths = [last - first for first, last in self._spans.values()]
        return type(self), (self._rows, list(self._spans), lengths, self.name)

    def __repr__(self) -> str:
        return f"ArrayStore({self.name!r}: {len(self)} ids, {len(self._rows)} x {self.dim})"


def pack(
    folder: str | os.PathLike[str],
    sequences: Iterable[tuple[str, np.ndarray]],
    dtype: type[np.floating] = np.float16,
) -> ArrayStore:
    """Write sequences as one memory-mapped store; one sequence at a time is held in memory.

    The index file is replaced last and names its rows by their content, so that a reader sees the
    old store or the new one, never a mixture, and an interrupted run leaves the old one whole.

    Args:
        folder: where the store goes; made when missing.
        sequences: pairs of id and (T, C) array, e.g. `((key, store[key]) for key in store)`.
        dtype: on disk; float16 keeps 3 decimal digits and half of the space.

    Returns:
        The store, opened.

    Raises:
        DataError: no sequences, a duplicate id, mixed widths, or values that `dtype` cannot hold.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    lengths: dict[str, int] = {}
    dim = None
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".packing-", suffix=".npy")
    try:
        with os.fdopen(handle, "wb") as file:
            for key, array in sequences:
                check_id(key, str(folder))
                if key in lengths:
                    raise DataError(f"{folder}: the id {key!r} was given twice")
                sequence = check_sequence(np.asarray(array), f"{folder}[{key!r}]", dim)
                if dim is None:
                    dim = sequence.shape[1]
                    data_start = _write_header(file, 0, dim, dtype)
                with np.errstate(over="ignore"):
                    stored = sequence.astype(dtype)
                if not np.isfinite(stored).all():
                    raise DataError(
                        f"{folder}[{key!r}]: values up to {np.abs(sequence).max():g} do not fit "
                        f"into {np.dtype(dtype)}"
                    )
                content = stored.tobytes()
                file.write(content)
                digest.update(content)
                lengths[key] = len(stored)
            if dim is None:
                raise DataError(f"{folder}: no sequences were given to pack")
            if _write_header(file, sum(lengths.values()), dim, dtype) != data_start:
                raise RuntimeError("numpy left no room in the .npy header for the row count")
        rows_name = f"rows-{digest.hexdigest()[:16]}.npy"
        os.replace(temporary, folder / rows_name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    index = folder / ArrayStore.INDEX
    try:
        replaced = check_id(json.loads(index.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        replaced = rows_name  # no store was here before
    paths.write_text(
        index,
        json.dumps(
            {
                "rows": rows_name,
                "sha256": digest.hexdigest(),
                "ids": list(lengths),
                "lengths": list(lengths.values()),
            }
        ),
    )
    if replaced != rows_name:
        (folder / replaced).unlink(missing_ok=True)
    return ArrayStore.open(folder)


def _write_header(file: Any, rows: int, dim: int, dtype: type[np.floating]) -> int:
    """Write (again) the .npy header, in which numpy leaves room for the first axis to grow.

    Returns:
        Where the data start.
    """
    file.seek(0)
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        file, {"descr": description, "fortran_order": False, "shape": (rows, dim)}
    )
    return file.tell()


class _View:
    """A store whose sequences are computed from those of another, id by id."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    @property
    def dim(self) -> int:
        return self.store.dim

    def __contains__(self, key: object) -> bool:
        return key in self.store

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store!r})"


class Strided(_View):
    """Every `factor`-th clip (SnAG's `downsample_rate`); its grid is `TimeGrid.downsample`."""

    def __init__(self, store: FeatureStore, factor: int) -> None:
        super().__init__(store)
        if factor < 1:
            raise DataError(f"features are strided by a positive integer, found {factor!r}")
        self.factor = factor

    def __getitem__(self, key: str) -> np.ndarray:
        return np.ascontiguousarray(self.store[key][:: self.factor])


class Resampled(_View):
    """Every video at the same number of clips, as SnAG does on Charades-STA and ActivityNet.

    Linear interpolation to the next multiple of `length`, then average pooling down to it; videos
    that are already that long are returned as they are.
    """

    def __init__(self, store: FeatureStore, length: int) -> None:
        super().__init__(store)
        if length < 1:
            raise DataError(f"features are resampled to a positive length, found {length!r}")
        self.length = length

    def grid(self, key: str, grid: TimeGrid) -> TimeGrid:
        """The grid of a video after resampling, given the one its features were extracted on."""
        return grid.resample(len(self.store[key]), self.length)

    def __getitem__(self, key: str) -> np.ndarray:
        sequence = torch.from_numpy(self.store[key])
        factor = -(-len(sequence) // self.length)
        signal = F.interpolate(sequence.T[None], size=self.length * factor, mode="linear")
        return F.avg_pool1d(signal, kernel_size=factor)[0].T.contiguous().numpy()


class Normalised(_View):
    """Every clip or word scaled to unit length; a vector of zeros stays zero."""

    def __getitem__(self, key: str) -> np.ndarray:
        return F.normalize(torch.from_numpy(self.store[key]), dim=-1).numpy()


class Concatenated:
    """Several features of the same clips side by side, e.g. SlowFast with CLIP, RGB with flow.

    Extractors may disagree by a clip at the end of a video: the last clip of the shorter ones is
    repeated (SnAG). An id is present when every store has it.

    Args:
        stores: at least one, joined in this order along the channels.
        tolerance: by how many clips the lengths of one video may differ.
    """

    def __init__(self, stores: Sequence[FeatureStore], tolerance: int = 1) -> None:
        if not stores:
            raise DataError("no stores were given to concatenate")
        self.stores = tuple(stores)
        self.tolerance = tolerance

    @property
    def dim(self) -> int:
        return sum(store.dim for store in self.stores)

    def __getitem__(self, key: str) -> np.ndarray:
        parts = [store[key] for store in self.stores]
        lengths = [len(part) for part in parts]
        longest = max(lengths)
        if longest - min(lengths) > self.tolerance:
            raise DataError(
                f"{key!r}: the stores disagree on its length by more than {self.tolerance}: "
                f"{lengths} clips in {list(self.stores)}"
            )
        padded = [np.pad(part, ((0, longest - len(part)), (0, 0)), "edge") for part in parts]
        return np.concatenate(padded, axis=1)

    def __contains__(self, key: object) -> bool:
        return all(key in store for store in self.stores)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.stores[0] if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Concatenated({list(self.stores)!r})"
