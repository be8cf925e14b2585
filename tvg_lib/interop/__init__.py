"""Published weights and configurations, brought into this library's models.

Names and layouts differ: the published code keeps (B, C, T) tensors, so its linear layers are
convolutions with kernel 1 and its norms hold (C, 1) vectors. Loading never runs pickled code.
"""

from tvg_lib.interop.files import read_configuration, read_weights
from tvg_lib.interop.grounder import (
    convert_grounder,
    decoding_config,
    hieramamba_config,
    load_hieramamba,
    load_snag,
    point_grid,
    snag_config,
)
from tvg_lib.interop.mamfusion import convert_mamfusion, mamfusion_config

__all__ = [
    "convert_grounder",
    "convert_mamfusion",
    "decoding_config",
    "hieramamba_config",
    "load_hieramamba",
    "load_snag",
    "mamfusion_config",
    "point_grid",
    "read_configuration",
    "read_weights",
    "snag_config",
]
