"""mamba-ssm's kernels when they are installed; nothing here is needed to run a layer.

Two distributions exist. The full build holds a CUDA extension (`selective_scan_cuda`) for S6; the
pure-Triton wheel (built with `MAMBA_SKIP_CUDA_BUILD=TRUE`) holds only the SSD kernels and the gated
norm; since mamba-ssm imports its extension in any case, an empty module stands in for it meanwhile.
`causal-conv1d` is a package of its own. Each piece is looked up by itself, on first use.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from tvg_lib.errors import ConfigurationError

Backend = Literal["auto", "reference", "torch", "mamba_ssm"]
"""How a scan is computed: the readable recurrence, the chunked PyTorch path, or mamba-ssm's kernel.
`auto` takes the kernel for tensors on a GPU where it is installed, else the PyTorch path."""

_EXTENSION = "selective_scan_cuda"


@dataclass(frozen=True)
class Kernel:
    """One entry point of an optional package, or the reason why it cannot be used."""

    name: str
    call: Callable[..., Any] | None
    reason: str = ""


@cache
def find(module: str, name: str) -> Kernel:
    """Import `name` from `module` once; a failing import becomes the kernel's `reason`."""
    lacking = module.startswith("mamba_ssm") and not _has_extension()
    if lacking:
        sys.modules[_EXTENSION] = ModuleType(_EXTENSION)
    try:
        return Kernel(name, getattr(importlib.import_module(module), name))
    except Exception as error:  # a broken binary build raises more than ImportError
        return Kernel(name, None, f"{type(error).__name__}: {error}")
    finally:
        if lacking:
            del sys.modules[_EXTENSION]


@cache  # a search of the whole path would cost as much as a short scan
def _has_extension() -> bool:
    """Whether mamba-ssm's compiled part is there."""
    return _EXTENSION in sys.modules or importlib.util.find_spec(_EXTENSION) is not None


def selective_scan() -> Kernel:
    """S6: `selective_scan_fn` of mamba-ssm (needs the full build with its CUDA extension)."""
    if not _has_extension():
        return Kernel("selective_scan_fn", None, f"there is no module {_EXTENSION}")
    return find("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")


def chunk_scan() -> Kernel:
    """SSD: `mamba_chunk_scan_combined` of mamba-ssm (Triton)."""
    return find("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")


def gated_rms_norm() -> Kernel:
    """`rmsnorm_fn` of mamba-ssm (Triton)."""
    return find("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")


def causal_conv1d() -> Kernel:
    """`causal_conv1d_fn` of the package causal-conv1d (CUDA)."""
    return find("causal_conv1d", "causal_conv1d_fn")


def wanted(backend: Backend, kernel: Callable[[], Kernel], x: Tensor, obstacle: str = "") -> bool:
    """Decide whether `kernel` computes this call.

    Args:
        backend: the caller's choice.
        kernel: one of the look-ups above; only called when the kernel could be used.
        x: the input whose device and type decide.
        obstacle: what this kernel cannot do although the caller asks for it; empty if nothing.

    Raises:
        ConfigurationError: the kernel was asked for by name and cannot be used, or an unknown name.
    """
    if backend not in ("auto", "reference", "torch", "mamba_ssm"):
        raise ConfigurationError(
            f"backend: expected 'auto', 'reference', 'torch' or 'mamba_ssm', found {backend!r}"
        )
    if backend in ("reference", "torch"):
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.dtype == torch.float64:
        obstacle = obstacle or "float64 is not supported by the kernels"
    elif not x.is_cuda and not interpreted:
        obstacle = obstacle or f"the tensor is on {x.device}, the kernels need a GPU"
    if backend == "auto":
        return x.is_cuda and not obstacle and kernel().call is not None
    if not obstacle and kernel().call is None:
        obstacle = f"{kernel().name} cannot be imported ({kernel().reason})"
    if obstacle:
        raise ConfigurationError(f"backend='mamba_ssm': {obstacle}; use 'auto' or 'torch'")
    return True
