"""Energy, forces and stress of one checkpoint: coset against metatrain's exported model.

Usage: python compare_metatrain.py MODEL.ckpt MODEL.pt --python PYTHON_WITH_METATRAIN [--threads 2]

MODEL.pt is `mtt export MODEL.ckpt`. Each code runs in its own process, through its own ASE
calculator, on the same perturbed copies, interleaved A B A B; medians are compared. The last line
of each size also gives the time of coset's matrix products alone. One JSON row per size is added to
benchmarks/results/speed.jsonl.
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from ase.build import bulk

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "speed.jsonl"
SIZES = {4: 1, 32: 2, 108: 3, 500: 5}


class Worker:
    """A process that answers evaluation requests."""

    def __init__(self, *command):
        """Start it and wait until it is ready."""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read()

    def read(self):
        """The next answer."""
        return json.loads(self.process.stdout.readline())

    def ask(self, atoms, **extra):
        """Evaluate one structure."""
        request = {
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "cell": atoms.cell.tolist(),
            "pbc": atoms.pbc.tolist(),
            **extra,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()


def compare(workers, atoms, rounds):
    """Median seconds of each code, and their largest difference in energy per atom and force."""
    seconds = {name: [] for name in workers}
    worst = [0.0, 0.0]
    for number in range(rounds):
        copy = atoms.copy()
        copy.rattle(0.05, seed=number)
        answers = {name: worker.ask(copy) for name, worker in workers.items()}
        for name, answer in answers.items():
            seconds[name].append(answer["seconds"])
        first, second = answers["coset"], answers["metatrain"]
        worst[0] = max(worst[0], abs(first["energy"] - second["energy"]) / len(atoms))
        difference = np.array(first["forces"]) - np.array(second["forces"])
        worst[1] = max(worst[1], float(np.abs(difference).max()))
    return {name: float(np.median(values)) for name, values in seconds.items()}, worst


def main():
    """Compare at all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("exported")
    parser.add_argument("--python", required=True, help="interpreter that has metatrain")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skin", default="2.0", help="Å, of metatrain's calculator")
    options = parser.parse_args()
    threads = ("--threads", options.threads)
    rival = (options.python, HERE / "metatrain_worker.py", options.exported, *threads)
    workers = {
        "coset": Worker(sys.executable, HERE / "coset_worker.py", options.checkpoint, *threads),
        "metatrain": Worker(*rival, "--skin", options.skin),
    }
    print("atoms   coset ms   metatrain ms   ratio   coset/GEMM   dE eV/atom   dF eV/Å")
    RESULTS.parent.mkdir(exist_ok=True)
    for n_atoms, repeat in SIZES.items():
        atoms = bulk("Al", "fcc", 4.05, cubic=True) * (repeat, repeat, repeat)
        median, worst = compare(workers, atoms, options.rounds)
        gemm = workers["coset"].ask(atoms, gemm=True)["gemm_seconds"]
        ratio = median["coset"] / median["metatrain"]
        print(
            f"{n_atoms:5d} {1e3 * median['coset']:10.2f} {1e3 * median['metatrain']:14.2f}"
            f" {ratio:7.2f} {median['coset'] / gemm:12.2f} {worst[0]:12.1e} {worst[1]:9.1e}"
        )
        row = {
            "benchmark": "energy_forces_stress",
            "system": f"Al{n_atoms}",
            "model": Path(options.checkpoint).name,
            "threads": int(options.threads),
            "metatrain_skin_A": float(options.skin),
            "seconds": median,
            "gemm_seconds": gemm,
            "ratio": ratio,
            "machine": platform.machine(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
