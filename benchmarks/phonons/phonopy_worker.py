"""Serve phonons of a metatrain checkpoint by phonopy and ASE calculators, in float64, over pipes.

Usage: python phonopy_worker.py MODEL.ckpt [--threads N]

Run it with a Python that has metatrain, metatomic-ase, phonopy and symfc. A request is one JSON
line {"numbers", "positions", "cell", "mesh", "q", "turn", "method", "displacements"}: a primitive
cell, its supercell, wave vectors, a rotation of the lab, a method of
benchmarks/symmetry/symmetrized_worker.py, and which displacements:

    default      irreducible, 0.01 Å, one sign where symmetry turns it into the other
    irreducible  the same with both signs
    all          every primitive atom by ±0.01 Å along x, y and z

The first two take phonopy's own force constants, symmetrized, the last the projection by symfc. The
answer has D(q) in eV/Å²/amu, turned back to the axes of the request, as real and imaginary part,
the seconds (on the clock, of the processor) and the number of supercells.
With "most": N only so many supercells are evaluated, and there is no D(q).
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from metatrain.utils.io import load_model
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

sys.path.insert(0, str(Path(__file__).parents[1] / "symmetry"))

from symmetrized_worker import PACKAGES, prepared

STEP = 0.01
"""Å: the default of phonopy."""


def displace_all(phonon):
    """Every atom of the primitive cell along ±x, ±y and ±z."""
    natom, moved = len(phonon.supercell), phonon.primitive.p2s_map
    displacements = np.zeros((len(moved), 3, 2, natom, 3))
    for number, atom in enumerate(moved):
        for axis in range(3):
            displacements[number, axis, :, atom, axis] = STEP, -STEP
    phonon.dataset = {"natom": natom, "displacements": displacements.reshape(-1, natom, 3)}


def forces_of(calculator, cell):
    """Forces on a supercell of phonopy, eV/Å."""
    calculator.reset()
    atoms = Atoms(cell.symbols, positions=cell.positions, cell=cell.cell, pbc=True)
    calculator.calculate(atoms, ["energy", "forces"], ["positions", "cell", "numbers"])
    return calculator.results["forces"]


def answer_to(request, calculator):
    """Dynamical matrices, seconds, number of supercells."""
    start, cpu = time.perf_counter(), time.process_time()
    turn = np.array(request["turn"])
    cell = PhonopyAtoms(
        numbers=request["numbers"],
        cell=request["cell"] @ turn.T,
        positions=request["positions"] @ turn.T,
    )
    phonon = Phonopy(cell, supercell_matrix=request["mesh"], primitive_matrix="P", symprec=1e-5)
    if request["displacements"] == "all":
        displace_all(phonon)
    else:
        signs = True if request["displacements"] == "irreducible" else "auto"
        phonon.generate_displacements(distance=STEP, is_plusminus=signs)
    every = phonon.supercells_with_displacements
    chosen = every[: request.get("most", len(every))]
    forces = [forces_of(calculator, one) for one in chosen]
    found = {"supercells": len(every), "atoms": len(phonon.supercell)}
    if len(chosen) == len(every):
        found["matrices"] = matrices_of(phonon, forces, request, turn)
    found["seconds"] = [time.perf_counter() - start, time.process_time() - cpu]
    return found


def matrices_of(phonon, forces, request, turn):
    """[real and imaginary part, wave vectors, dim, dim]."""
    phonon.forces = np.array(forces)
    if request["displacements"] == "all":
        phonon.produce_force_constants(fc_calculator="symfc")
    else:
        phonon.produce_force_constants()
        phonon.symmetrize_force_constants()
    found = phonon.run_qpoints(request["q"], with_dynamical_matrices=True).dynamical_matrices
    found = np.array(found)
    blocks = found.reshape(len(found), len(phonon.primitive), 3, len(phonon.primitive), 3)
    back = np.einsum("ba,qibjc,cd->qiajd", turn, blocks, turn, optimize=True).reshape(found.shape)
    return [back.real.tolist(), back.imag.tolist()]


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
    versions = {name: version(name) for name in (*PACKAGES, "phonopy", "symfc")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported.save(str(folder / "plain.pt"))
        print(json.dumps(versions), file=output, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            calculator, evaluations = prepared(exported, folder, request["method"])
            answer = answer_to(request, calculator) | {"evaluations": evaluations}
            print(json.dumps(answer), file=output, flush=True)


if __name__ == "__main__":
    main()
