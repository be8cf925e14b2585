"""State-space layers that run anywhere: S6 (Mamba), SSD (Mamba2) and Hydra.

Each scan exists as a readable recurrence, as a fast PyTorch path for CPU and GPU, and, where
mamba-ssm is installed and the tensor is on a GPU, as its kernel. See `Backend`.
"""

from tvg_lib.ssm.kernels import Backend
from tvg_lib.ssm.layers import DepthwiseConv, GatedRMSNorm, Hydra, Mamba, Mamba2, MambaState
from tvg_lib.ssm.s6 import s6_reference, s6_scan
from tvg_lib.ssm.ssd import ssd_reference, ssd_scan

__all__ = [
    "Backend",
    "DepthwiseConv",
    "GatedRMSNorm",
    "Hydra",
    "Mamba",
    "Mamba2",
    "MambaState",
    "s6_reference",
    "s6_scan",
    "ssd_reference",
    "ssd_scan",
]
