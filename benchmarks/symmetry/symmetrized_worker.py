"""Serve rotational averages of a metatrain checkpoint over pipes, in float64.

Usage: python symmetrized_worker.py MODEL.ckpt [--threads N]

Run it with a Python that has metatrain and metatomic-ase. The checkpoint is exported in float64 and
loaded again as TorchScript. A request is one JSON line {"numbers", "positions", "cell", "pbc",
"method"}; the answer has the seconds of energy, forces and stress (on the clock, of the processor),
their values, and how often the model was evaluated; with "count" only that. Methods are "plain",
"calculator L [proper] [group]" (SymmetrizedCalculator, l_max L, without inversion, with its space
group part) and "model [L]" (SymmetrizedModel, of its own choice or of grid degree L).
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from ase import Atoms
from metatomic.torch.o3 import SymmetrizedModel
from metatomic_ase import MetatomicCalculator, SymmetrizedCalculator
from metatrain.utils.io import load_model

PACKAGES = ("torch", "metatomic-torch", "metatomic-ase", "metatrain")
BATCH = 32
"""Copies in one call of SymmetrizedCalculator: the default of SymmetrizedModel; more do not fit in
memory for large cells. All 84 at once are 8 % faster for Al and 12 % slower for Si (one thread)."""


@cache
def plain_calculator(model):
    """The calculator of an exported model, one for all that use it."""
    return MetatomicCalculator(model, device="cpu", check_consistency=False)


@cache
def prepared(exported, folder, method):
    """The calculator of a method and the evaluations of the model that one answer takes."""
    kind, *words = method.split()
    if kind == "plain":
        return plain_calculator(str(folder / "plain.pt")), 1
    if kind == "calculator":
        calculator = SymmetrizedCalculator(
            plain_calculator(str(folder / "plain.pt")),
            l_max=int(words[0]),
            batch_size=BATCH,
            include_inversion="proper" not in words,
            apply_space_group_symmetry="group" in words,
        )
        return calculator, len(calculator.quadrature_rotations) + 1  # and once without a rotation
    grid = int(words[0]) if words else None
    wrapped = SymmetrizedModel.wrap(exported, max_angular_momentum_grid=grid)
    name = folder / f"{method}.pt"
    wrapped.save(str(name))
    return plain_calculator(str(name)), 2 * len(wrapped.module._rotation_weights)  # with inversion


def evaluate(calculator, atoms):
    """Energy, forces and stress, and the seconds they took."""
    calculator.reset()
    atoms.calc = calculator
    start, cpu = time.perf_counter(), time.process_time()
    calculator.calculate(atoms, ["energy", "forces", "stress"], ["positions", "cell", "numbers"])
    seconds = [time.perf_counter() - start, time.process_time() - cpu]
    stress = atoms.get_stress(voigt=False)
    return {
        "seconds": seconds,
        "energy": float(calculator.results["energy"]),
        "forces": calculator.results["forces"].tolist(),
        "stress": stress.tolist(),
    }


def main():
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed must not disturb the answers
    exported = load_model(arguments.model).to(torch.float64).export()
    versions = {name: version(name) for name in PACKAGES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported.save(str(folder / "plain.pt"))
        print(json.dumps(versions), file=output, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            atoms = Atoms(**{key: request[key] for key in ("numbers", "positions", "cell", "pbc")})
            calculator, evaluations = prepared(exported, folder, request["method"])
            answer = {} if "count" in request else evaluate(calculator, atoms)
            answer["evaluations"] = evaluations
            print(json.dumps(answer), file=output, flush=True)


if __name__ == "__main__":
    main()
