"""Write what metatrain itself predicts with a checkpoint, as reference numbers.

Usage: python metatrain_reference.py CHECKPOINT OUTPUT.npz [CHECKPOINT OUTPUT.npz ...]

Run it with a Python that has metatrain and metatomic-ase installed. CHECKPOINT is a .ckpt
file of PET, or of an LLPR model around PET, of any version that the installed metatrain can
upgrade; it may be compressed (.ckpt.gz). The model runs eagerly in float64 on four
structures made of its own elements. OUTPUT.npz has the keys `structure/field` with the
fields positions, cell, pbc, numbers, charge, spin, energy (eV), forces (eV/Å) and, if periodic
in three directions, stress (eV/Å³, 3x3); nc_forces (mean removed) and nc_stress are present if
the model has direct heads. Models with charge and spin see charge 1 and spin multiplicity 2 in
`cluster`. With several energy variants the first in alphabetical order is used; its name is
stored under the key `energy_name`.
"""

import gzip
import sys
import warnings

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import covalent_radii
from metatomic_ase import MetatomicCalculator
from metatrain.utils.io import model_from_checkpoint


def load(path):
    """Return the exported (eager, float64) PET model of a checkpoint.

    Exported LLPR models keep the dtype they were made with, so the model inside is taken.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rb") as file:
        checkpoint = torch.load(file, weights_only=False)  # security: allowed, metatrain wrote it
    model = model_from_checkpoint(checkpoint, context="export")
    if checkpoint["architecture_name"] == "llpr":
        model = model.model
    return model.to(torch.float64).eval().export()


def build_structures(elements):
    """Return named structures that contain only the given atomic numbers."""
    rng = np.random.default_rng(3)
    elements = np.sort(elements)
    a = 2.6 * covalent_radii[elements].mean() + 1.05
    crystal = bulk("Cu", "fcc", a=a, cubic=True)
    crystal.set_cell(crystal.cell @ (np.eye(3) + 0.04 * rng.normal(size=(3, 3))), scale_atoms=True)
    slab = bulk("Cu", "fcc", a=a, cubic=True).repeat((2, 1, 2))
    slab.cell[2, 2] += 12.0
    slab.pbc = (True, True, False)
    fractional = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1.2]])
    structures = {
        "crystal": crystal,
        "primitive": bulk("Cu", "fcc", a=1.03 * a),
        "cluster": Atoms("Cu6", 0.85 * a * fractional),
        "slab": slab,
    }
    for atoms in structures.values():
        atoms.numbers = rng.choice(elements, len(atoms))
        atoms.positions += 0.03 * a * rng.normal(size=atoms.positions.shape)
        atoms.info.update(charge=0, spin=1)
    return structures


def predict(calculator, atoms, prefix=""):
    """Return energy and forces, and the stress if it is defined."""
    atoms = atoms.copy()
    atoms.calc = calculator
    result = {f"{prefix}forces": atoms.get_forces()}
    if not prefix:
        result["energy"] = atoms.get_potential_energy()
    if atoms.pbc.all():
        result[f"{prefix}stress"] = atoms.get_stress(voigt=False)
    return result


def has_direct_heads(outputs):
    """Return whether the model predicts forces and stress directly."""
    forces = {"non_conservative_force", "non_conservative_forces"} & set(outputs)
    return bool(forces) and "non_conservative_stress" in outputs


def reference(path):
    """Return all reference numbers of one checkpoint."""
    model = load(path)
    outputs = model.capabilities().outputs
    name = min(key for key in outputs if key == "energy" or key.startswith("energy/"))
    variant = name.partition("/")[2] or None
    options = {"device": "cpu", "uncertainty_threshold": None}
    own = {"energy": variant, "non_conservative_force": None, "non_conservative_stress": None}
    calculator = MetatomicCalculator(model, variants=own, **options)
    direct = None
    if has_direct_heads(outputs):
        direct = MetatomicCalculator(model, variants=own, non_conservative=True, **options)

    structures = build_structures(model.capabilities().atomic_types)
    if "charge" in model.requested_inputs(use_new_names=True):
        structures["cluster"].info.update(charge=1, spin=2)
    numbers = {"energy_name": name}
    for label, atoms in structures.items():
        fields = dict(positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
        fields.update(numbers=atoms.numbers, **atoms.info)
        fields.update(predict(calculator, atoms))
        if direct:
            fields.update(predict(direct, atoms, prefix="nc_"))
        numbers.update({f"{label}/{key}": value for key, value in fields.items()})
    return numbers


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for checkpoint, output in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        np.savez_compressed(output, **reference(checkpoint))
