"""HieraMamba against the length of the video: time and peak memory (see `grounders.py`).

    python benchmarks/hieramamba.py --out benchmarks/results/hieramamba_cpu.json
    python benchmarks/hieramamba.py --out benchmarks/results/hieramamba_cpu.json --append \\
        --modes encoding question --clips 2304 8192 32768 54000 131072
    python benchmarks/hieramamba.py --out benchmarks/results/hieramamba_cuda.json --device cuda

The released TACoS configuration; 54,000 clips are three hours at five clips a second.
"""

from grounders import main

from tvg_lib.models.hieramamba import HieraMamba
from tvg_lib.recipes import HIERAMAMBA_TACOS, TACOS

if __name__ == "__main__":
    main(
        __file__,
        "TACOS",
        lambda: HieraMamba(HIERAMAMBA_TACOS.architecture),
        {"training": HIERAMAMBA_TACOS.objective, "detection": TACOS.objective},
    )
