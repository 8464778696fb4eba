"""Time of a conductivity from finished force constants: phono3py alone, and with our products.

Both in one run and on the same threads, relaxation times at 300 K with isotopes; medians.

    coset conductivity Si.cif ZnO.cif -o k
    python benchmarks/workflows/collisions.py k/Si-conductivity 9,9,9 k/ZnO-conductivity 7,7,5

No argument of phono3py is changed: its own is `conductivity_calculator` with the interaction that
`init_phph_interaction` has made.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import median

import numpy as np
import phono3py
import torch
from phono3py import Phono3py

from coset.workflows.conductivity import by_phono3py
from coset.workflows.conductivity.by_phono3py import Anharmonic

Mesh = tuple[int, int, int]
LIMIT = by_phono3py.STRENGTH_BYTES


def load(folder: Path) -> Phono3py:
    """Force constants that `coset conductivity` has written."""
    here = Path.cwd()
    os.chdir(folder)  # where phono3py looks for them
    try:
        return phono3py.load("phono3py_params.yaml", log_level=0)
    finally:
        os.chdir(here)


def seconds(calculation: Phono3py, mesh: Mesh, limit: int) -> tuple[float, float]:
    """Wall time and conductivity; a limit of 0 leaves all to phono3py."""
    by_phono3py.STRENGTH_BYTES = limit
    start = time.perf_counter()
    found = Anharmonic(calculation).kappa(
        mesh, (300.0,), isotopes=True, boundary_um=None, method="rta"
    )
    return time.perf_counter() - start, float(np.trace(found.rta[0])) / 3.0


def main() -> None:
    """A line for each folder and mesh."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", metavar="FOLDER MESH", help="pairs of both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="as RAYON_NUM_THREADS says, too")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    for folder, text in zip(told.cases[::2], told.cases[1::2], strict=True):
        calculation = load(Path(folder))
        mesh = tuple(int(n) for n in text.split(","))
        times: dict[int, list[float]] = {0: [], LIMIT: []}
        kappas = {}
        for _ in range(told.repeats):
            for limit, found in times.items():
                taken, kappas[limit] = seconds(calculation, mesh, limit)
                found.append(taken)
        plain, ours = median(times[0]), median(times[LIMIT])
        print(
            f"{Path(folder).name} {text}: phono3py {plain:.1f} s, coset {ours:.1f} s, "
            f"ratio {plain / ours:.2f}; {kappas[0]:.6f} and {kappas[LIMIT]:.6f} W/mK"
        )


if __name__ == "__main__":
    main()
