"""Parity of an imported checkpoint with metatrain itself, where metatrain is installed.

metatrain reads checkpoints in a way that can execute what is in them: check only files you trust.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coset.ase_interface import to_ase
from coset.checkpoint import Checkpoint
from coset.errors import MissingExtraError
from coset.loading import LoadSettings, potential_of
from coset.structures import Structures, concatenate, make_structure, split


def compare_with_metatrain(path: str | Path, checkpoint: Checkpoint) -> dict[str, float]:
    """Largest float64 differences on three small structures: eV/atom, eV/Å, eV/Å³.

    Raises:
        MissingExtraError: metatrain or metatomic-ase is not installed.
    """
    if find_spec("metatrain") is None or find_spec("metatomic_ase") is None:
        raise MissingExtraError(
            "the parity check runs metatrain itself, which is not installed",
            hint="pip install metatrain metatomic-ase",
        )
    target = checkpoint.hypers.targets_of("energy")[0]
    potential = potential_of(checkpoint, LoadSettings(target=target, dtype="float64", device="cpu"))
    structures = probe_structures(checkpoint.hypers.atomic_types)
    ours, theirs = potential(structures), _metatrain_values(path, target, structures)
    assert ours.energy is not None
    assert ours.forces is not None
    assert ours.stress is not None
    periodic = structures.pbc.all(1)
    return {
        "energy_per_atom_eV": _largest((ours.energy - theirs[0]) / structures.n_atoms),
        "forces_eV_per_A": _largest(ours.forces - theirs[1]),
        "stress_eV_per_A3": _largest(ours.stress[periodic] - theirs[2]),
    }


def probe_structures(atomic_types: tuple[int, ...]) -> Structures:
    """A distorted crystal, its supercell with a vacancy, and a cluster, of the given elements."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fcc = torch.tensor([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]], dtype=torch.float64)
    cell = 4.0 * torch.eye(3, dtype=torch.float64) + 0.1 * noise(3, 3)
    shifted = torch.cat([fcc, fcc + cell[0]])[:-1]
    sites = [(fcc, cell, True), (shifted, cell * torch.tensor([[2.0], [1], [1]]), True)]
    sites.append((fcc, torch.zeros(3, 3, dtype=torch.float64), False))
    types = torch.tensor(atomic_types)
    made = []
    for positions, lattice, periodic in sites:
        chosen = types[torch.randint(len(types), (len(positions),), generator=generator)]
        moved = positions + 0.1 * noise(len(positions), 3)
        made.append(make_structure(moved, chosen, cell=lattice, pbc=(periodic,) * 3))
    return concatenate(made)


def _metatrain_values(
    path: str | Path, target: str, structures: Structures
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, forces, and the stress of the periodic structures, by metatrain in float64."""
    load: Any = import_module("metatrain.utils.io").load_model
    calculator_type: Any = import_module("metatomic_ase").MetatomicCalculator
    model = load(str(path))
    model = getattr(model, "model", model) if type(model).__name__.startswith("LLPR") else model
    variant = target.partition("/")[2] or None
    options = {"variants": {"energy": variant}} if variant else {}
    calculator = calculator_type(model.to(torch.float64).eval().export(), device="cpu", **options)
    energies, forces, stresses = [], [], []
    for atoms, one in zip(to_ase(structures), split(structures), strict=True):
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(torch.from_numpy(atoms.get_forces()))
        if bool(one.pbc.all()):
            stresses.append(torch.from_numpy(atoms.get_stress(voigt=False)))
    energy = torch.tensor(energies, dtype=torch.float64)
    return energy, torch.cat(forces), torch.stack(stresses)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
