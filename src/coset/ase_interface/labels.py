"""Labels that frames carry, and frames that carry labels."""

from collections.abc import Sequence
from pathlib import Path

import ase.io
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from coset.ase_interface.atoms import to_ase
from coset.ase_interface.calculators import results_of
from coset.structures import Properties, Structures


def symbols_of(atomic_numbers: Sequence[int]) -> list[str]:
    """Chemical symbols in the order of the atomic numbers."""
    return [chemical_symbols[number] for number in sorted(atomic_numbers)]


def labels_of(atoms: Atoms) -> Properties:
    """Energy and forces stored with a frame; None where there are none."""
    if atoms.calc is None:
        return Properties()
    try:
        energy = torch.tensor([atoms.get_potential_energy()], dtype=torch.float64)
        forces = torch.from_numpy(atoms.get_forces(apply_constraint=False))
    except (PropertyNotImplementedError, RuntimeError):
        return Properties()
    return Properties(energy=energy, forces=forces)


def append_frame(path: Path, one: Structures, properties: Properties, *, fresh: bool) -> None:
    """Add one structure with its properties to an extended XYZ file; `fresh` starts a new one."""
    (frame,) = to_ase(one)
    frame.calc = SinglePointCalculator(frame, **results_of(properties, one, 0))
    ase.io.write(path, frame, format="extxyz", append=not fresh)
