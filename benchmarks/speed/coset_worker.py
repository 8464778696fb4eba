"""Answer evaluation requests with coset through its ASE calculator; one JSON line each.

Usage: python coset_worker.py MODEL [--threads N] [--dtype mixed]

A request is {"numbers", "positions", "cell", "pbc"}; the answer has the seconds of energy, forces
and stress, and their values. With {"gemm": true} it also has the seconds that the matrix products
of that evaluation take by themselves: a bound for anything built on the same library.
"""

import argparse
import json
import sys
import time
from collections import Counter

import numpy as np
import torch
from ase import Atoms
from torch.utils._python_dispatch import TorchDispatchMode

import coset
from coset.ase_interface import Calculator
from coset.loading import LoadSettings

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Recorder(TorchDispatchMode):
    """Counts the shapes of all matrix products."""

    def __init__(self):
        """Nothing seen."""
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Remember the two factors."""
        if func in PRODUCTS:
            first, second = args[-2:]
            shapes = tuple(first.shape), tuple(first.stride()), tuple(second.shape)
            self.seen[(*shapes, tuple(second.stride()), first.dtype)] += 1
        return func(*args, **(kwargs or {}))


def gemm_seconds(shapes, repeats=5):
    """Median time of all recorded products, alone."""
    pairs = []
    for (a, a_stride, b, b_stride, dtype), count in shapes.items():
        pair = [
            torch.empty_strided(size, stride, dtype=dtype).normal_()
            for size, stride in ((a, a_stride), (b, b_stride))
        ]
        pairs += [pair] * count
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for first, second in pairs:
            first @ second
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def evaluate(calculator, atoms):
    """Energy, forces and stress with the time they took."""
    atoms.calc = calculator
    start = time.perf_counter()
    energy = atoms.get_potential_energy()
    forces = atoms.get_forces()
    stress = atoms.get_stress(voigt=False).tolist() if atoms.pbc.all() else None
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "energy": energy, "forces": forces.tolist(), "stress": stress}


def main():
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="mixed")
    parser.add_argument("--warmup", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = LoadSettings(dtype=arguments.dtype, device="cpu")
    calculator = Calculator(coset.load_model(arguments.model, settings))
    print(json.dumps({"ready": True, "torch": torch.__version__}), flush=True)
    numbers = None
    for line in sys.stdin:
        request = json.loads(line)
        fields = ("numbers", "positions", "cell", "pbc")
        atoms = Atoms(**{key: request[key] for key in fields})
        if not np.array_equal(numbers, atoms.numbers):
            numbers = atoms.numbers
            for seed in range(arguments.warmup):
                copy = atoms.copy()
                copy.rattle(1e-3, seed=seed)
                evaluate(calculator, copy)
        answer = evaluate(calculator, atoms)
        if request.get("gemm"):
            copy = atoms.copy()
            copy.rattle(1e-3)
            with Recorder() as recorder:
                evaluate(calculator, copy)
            answer["gemm_seconds"] = gemm_seconds(recorder.seen)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
