"""Serve energies, forces and stresses of an exported metatrain model over pipes.

Usage: python metatrain_worker.py MODEL.pt [--threads N] [--warmup N] [--skin X]

Run it with a Python that has metatrain and metatomic-ase installed. The worker prints one
line {"ready": true, ...} after loading. It then reads one JSON request per line,
{"numbers": [...], "positions": [[...]], "cell": [[...]], "pbc": [...]}, and answers with
{"seconds": ..., "energy": ..., "forces": ..., "stress": ...} (eV, eV/Å, eV/Å³ 3x3; stress is
null unless the structure is periodic in three directions). The time covers the ASE
calculator only: neighbor list, model and gradients, not the JSON. Whenever the atoms
change, the model is first run on displaced copies so that TorchScript has specialized for
the new sizes. The client should send other positions each time; cached results are
discarded in any case.
"""

import argparse
import json
import os
import sys
import time
import warnings

import numpy as np
import torch
from ase import Atoms
from metatomic_ase import MetatomicCalculator


def build_atoms(request):
    """Return the structure of a request."""
    keys = ("numbers", "positions", "cell", "pbc")
    return Atoms(**{key: np.asarray(request[key]) for key in keys})


def evaluate(calculator, atoms):
    """Return energy, forces, stress and the seconds one evaluation took."""
    calculator.reset()
    atoms.calc = calculator
    start = time.perf_counter()
    energy = atoms.get_potential_energy()  # computes the gradients too, in one pass
    forces = atoms.get_forces()
    stress = atoms.get_stress(voigt=False).tolist() if atoms.pbc.all() else None
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "energy": energy, "forces": forces.tolist(), "stress": stress}


def warm_up(calculator, atoms, calls):
    """Evaluate slightly displaced copies of a structure."""
    rng = np.random.default_rng(0)
    for _ in range(calls):
        copy = atoms.copy()
        copy.positions += 1e-3 * rng.normal(size=copy.positions.shape)
        evaluate(calculator, copy)


def serve(calculator, calls, requests, output):
    """Answer requests until the input ends."""
    numbers = None
    for line in requests:
        atoms = build_atoms(json.loads(line))
        if not np.array_equal(numbers, atoms.numbers):
            numbers = atoms.numbers
            warm_up(calculator, atoms, calls)
        print(json.dumps(evaluate(calculator, atoms)), file=output, flush=True)


def reserve_stdout():
    """Return the real standard output; anything else printed goes to standard error."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return output


def main():
    """Load the model and serve requests on standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=12, help="calls before a new structure")
    parser.add_argument("--skin", type=float, default=2.0, help="Å; default of the calculator")
    arguments = parser.parse_args()

    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    output = reserve_stdout()
    calculator = MetatomicCalculator(
        arguments.model, device="cpu", check_consistency=False, neighbor_skin=arguments.skin
    )
    ready = {"ready": True, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(ready), file=output, flush=True)
    serve(calculator, arguments.warmup, sys.stdin, output)


if __name__ == "__main__":
    main()
