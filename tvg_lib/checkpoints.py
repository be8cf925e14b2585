"""Training states on disk: one safetensors file, written atomically, without pickles.

Tensors are stored by slash-separated names, everything else as JSON in the header. A checksum over
the tensors is kept there too, because safetensors itself notices a truncated file but not a changed
byte.
"""

import json
import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tvg_lib import paths
from tvg_lib.errors import DataError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step: a reader, or a kill, finds the old content or the new one."""
    with paths.replacing(path) as temporary:
        temporary.write_bytes(data)


def write_state(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-serialisable state in one step.

    Tensors that share memory (tied weights) are stored twice and read back equal.

    Raises:
        TypeError: `state` is not JSON-serialisable, or a value of `tensors` is not a tensor.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} is a {type(value).__name__}, not a tensor")
    plain = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()
    }
    header = {"state": json.dumps(state), "crc32": str(_checksum(plain))}
    with paths.replacing(path) as temporary:
        save_file(plain, temporary, metadata=header)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of a file that `write_state` wrote.

    Raises:
        DataError: the file is missing, truncated or changed, or is no such file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            # Cloned, because the file is mapped into memory and may be replaced later.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: expected a safetensors file, found: {error}") from error
    if not {"state", "crc32"} <= set(header):
        raise DataError(f"{path}: expected a training state, found a header with {sorted(header)}")
    if header["crc32"] != str(_checksum(tensors)):
        raise DataError(
            f"{path}: expected checksum {header['crc32']}, found {_checksum(tensors)}; "
            "the file was changed after it was written"
        )
    return tensors, json.loads(header["state"])


def nested(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix/`, by the rest of their names."""
    start = prefix + "/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors named `prefix/name`."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the generators of python, numpy, torch and, where in use, the current CUDA device.

    Returns:
        (tensors, rest), for `set_rng_state`; the rest is JSON-serialisable.
    """
    version, internal, python_gauss = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors = {
        "python": torch.tensor(internal),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {
        "python": [version, python_gauss],
        "numpy": [kind, position, has_gauss, gauss],
    }


def set_rng_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put all generators back to a state that `rng_state` took."""
    version, python_gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))
    kind, position, has_gauss, gauss = rest["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves the generators outside untouched."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(*before)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value
