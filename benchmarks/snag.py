"""SnAG against the length of the video: time and peak memory (see `grounders.py`).

    python benchmarks/snag.py --out benchmarks/results/snag_cpu.json --clips 512 2304 16384
    python benchmarks/snag.py --out benchmarks/results/snag_cuda.json --device cuda

The released TACoS configuration.
"""

from grounders import main

from tvg_lib.models.snag import SnAG
from tvg_lib.recipes import TACOS

if __name__ == "__main__":
    main(__file__, "TACOS", lambda: SnAG(TACOS.architecture), {"training": TACOS.objective})
