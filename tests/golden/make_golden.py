"""Train tiny PET models with metatrain and store their predictions as reference numbers.

Usage: python make_golden.py [--output FOLDER] [--names NAME ...]

Made with metatrain 2026.4, metatomic-torch 0.1.19, metatomic-ase 0.1.4, metatensor-torch
0.10.8, vesin 0.6.2, torch 2.13.0 (CPU), ase 3.29.0, numpy 2.4.6, Python 3.11.

For every model the script trains two epochs in float64 on strained and rattled fcc cells
labeled with the EMT potential of ASE, strips the optimizer state from the checkpoint, and
evaluates six structures with the model class of metatrain (eager, not TorchScript) through
`MetatomicCalculator`. It writes `<name>.ckpt` and, for all models together, `golden.npz`
with keys `model/structure/field`. Fields: pos, cell, pbc, Z, charge, spin, energy (eV),
forces (eV/Å), nc_forces (direct forces, mean removed), and for structures periodic in three
directions stress and nc_stress (eV/Å³, 3x3). The model `variants` has two energies in one
checkpoint; their numbers are stored under `variants-a` and `variants-b`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import ase.io
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import bulk, fcc100
from ase.calculators.emt import EMT
from metatomic_ase import MetatomicCalculator
from metatrain.utils.io import model_from_checkpoint

ELEMENTS = ("Al", "Ni", "Cu", "Au")
SMALL = dict(
    cutoff=5.0, cutoff_width=0.5, cutoff_function="Bump", num_neighbors_adaptive=8,
    adaptive_cutoff_method="solver", cutoff_width_adaptive=1.0, d_pet=4, d_node=8, d_head=4,
    d_feedforward=8, num_heads=2, num_gnn_layers=2, num_attention_layers=1,
)  # fmt: skip
FIXED = dict(SMALL, cutoff=4.5, num_neighbors_adaptive=None)
MODELS = {
    "solver": dict(SMALL, num_attention_layers=2),
    "grid": dict(SMALL, adaptive_cutoff_method="grid", cutoff_width_adaptive=0.5),
    "legacy": dict(
        FIXED, cutoff_function="Cosine", normalization="LayerNorm", activation="SiLU",
        transformer_type="PostLN", featurizer_type="residual", d_node=4,
    ),
    "conditioned": dict(FIXED, system_conditioning=True, max_charge=3, max_spin_multiplicity=4),
    "temperature": dict(
        SMALL, normalization="LayerNorm", activation="SiLU", attention_temperature=1.5,
        d_head=6, cutoff_width=0.7, cutoff_width_adaptive=1.2, num_gnn_layers=3, num_heads=1,
    ),
    "postln": dict(
        SMALL, transformer_type="PostLN", featurizer_type="residual", cutoff_function="Cosine",
        adaptive_cutoff_method="grid", num_attention_layers=2,
    ),
    "variants": dict(SMALL),
    "zbl": dict(FIXED, zbl=True),
    "narrow": dict(SMALL, d_node=4),
}  # fmt: skip
CHARGE_SPIN = {"conditioned": (1, 2)}


def training_frames(count=40):
    """Return strained and rattled fcc cells with EMT labels E, E2, F, F2 and S."""
    rng = np.random.default_rng(1)
    frames = []
    for _ in range(count):
        atoms = bulk("Cu", "fcc", a=4.0, cubic=True)
        atoms.symbols[:] = rng.choice(ELEMENTS, len(atoms))
        strain = np.eye(3) + 0.05 * rng.normal(size=(3, 3))
        atoms.set_cell(atoms.cell @ strain, scale_atoms=True)
        atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
        atoms.calc = EMT()
        atoms.info["E"], atoms.info["E2"] = atoms.get_potential_energy() * np.array([1.0, 0.5])
        atoms.info["S"] = atoms.get_stress(voigt=False).ravel()
        atoms.arrays["F"] = atoms.get_forces()
        atoms.arrays["F2"] = 0.5 * atoms.arrays["F"]
        atoms.info["charge"], atoms.info["spin_multiplicity"] = rng.integers([-3, 1], [4, 5])
        atoms.calc = None
        frames.append(atoms)
    return frames


def structures():
    """Return the six evaluated structures by name."""
    rng = np.random.default_rng(2)
    crystal = bulk("Cu", "fcc", a=3.7, cubic=True)
    crystal.symbols[:] = ELEMENTS
    crystal.set_cell(crystal.cell @ (np.eye(3) + 0.04 * rng.normal(size=(3, 3))), scale_atoms=True)
    crystal.positions += 0.1 * rng.normal(size=(4, 3))
    slab = fcc100("Cu", (2, 2, 3), a=3.6, vacuum=8.0)
    slab.symbols[[0, 5, 11]] = ["Au", "Ni", "Al"]
    slab.positions += 0.05 * rng.normal(size=slab.positions.shape)
    slab.pbc = (True, True, False)
    positions = [[0, 0, 0], [2.3, 0, 0], [0.1, 2.4, 0.3], [1.1, 1.0, 2.0]]
    return {
        "crystal": crystal,
        "super": crystal.repeat((2, 2, 1)),
        "prim": bulk("Al", "fcc", a=4.05),
        "cluster": Atoms("Cu2AlNi", positions),
        "slab": slab,
        "isolated": Atoms("Au", [[0, 0, 0]]),
    }


def targets(name):
    """Return the target section of the options file."""
    energies = {"energy": ("E", "F")}
    if name == "variants":
        energies = {"energy/a": ("E", "F"), "energy/b": ("E2", "F2")}
    section = {
        key: {"quantity": "energy", "key": e, "unit": "eV", "forces": {"key": f}}
        for key, (e, f) in energies.items()
    }
    section["non_conservative_forces"] = dict(
        key="F", quantity="force", unit="eV/A", sample_kind="atom", type={"cartesian": {"rank": 1}}
    )
    section["non_conservative_stress"] = dict(
        key="S", quantity="pressure", unit="eV/A^3", type={"cartesian": {"rank": 2}}
    )
    return section


def options(name):
    """Return the metatrain options of one model."""
    data = {
        "systems": {"read_from": "data.xyz", "length_unit": "angstrom"},
        "targets": targets(name),
    }
    if name in CHARGE_SPIN:
        data["extra_data"] = {key: {"key": key} for key in ("charge", "spin_multiplicity")}
    training = dict(
        num_epochs=2, batch_size=4, learning_rate=1e-2, warmup_fraction=0.1, num_workers=0,
        per_structure_targets=["non_conservative_stress"],
    )  # fmt: skip
    return {
        "seed": 1,
        "device": "cpu",
        "base_precision": 64,
        "architecture": {"name": "pet", "model": MODELS[name], "training": training},
        "training_set": data,
        "validation_set": 0.2,
        "test_set": 0.0,
    }


def train(name, folder):
    """Train one model with the command line of metatrain; return its checkpoint."""
    ase.io.write(folder / "data.xyz", training_frames())
    (folder / "options.yaml").write_text(yaml.safe_dump(options(name)))
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [str(Path(sys.executable).with_name("mtt")), "train", "options.yaml"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    path = folder / "model.ckpt"
    return torch.load(path, weights_only=False)  # security: allowed, metatrain wrote it


def strip(checkpoint):
    """Return the checkpoint without optimizer state, keeping only the best weights."""
    for key in ("optimizer", "scheduler", "best_optimizer"):
        checkpoint[f"{key}_state_dict"] = None
    checkpoint["model_state_dict"] = checkpoint["best_model_state_dict"]
    return checkpoint


def predict(model, atoms, variant):
    """Return the predictions of an exported model for one structure."""
    choice = {"variants": {"energy": variant}} if variant else {}
    direct = {"non_conservative_force": None, "non_conservative_stress": None}
    atoms = atoms.copy()
    atoms.calc = MetatomicCalculator(model, device="cpu", **choice)
    result = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        result["stress"] = atoms.get_stress(voigt=False)
    choice = {"variants": {"energy": variant, **direct}} if variant else {}
    atoms.calc = MetatomicCalculator(model, device="cpu", non_conservative=True, **choice)
    result["nc_forces"] = atoms.get_forces()
    if atoms.pbc.all():
        result["nc_stress"] = atoms.get_stress(voigt=False)
    return result


def evaluate(path, name):
    """Return the reference numbers of one checkpoint, keyed model/structure/field."""
    checkpoint = torch.load(path, weights_only=False)  # security: allowed, metatrain wrote it
    model = model_from_checkpoint(checkpoint, context="export").eval().export()
    charge, spin = CHARGE_SPIN.get(name, (0, 1))
    golden = {}
    for variant in ("a", "b") if name == "variants" else (None,):
        label = f"{name}-{variant}" if variant else name
        for structure, atoms in structures().items():
            atoms.info.update(charge=charge, spin=spin)
            fields = dict(pos=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
            fields.update(Z=atoms.numbers, charge=charge, spin=spin)
            fields.update(predict(model, atoms, variant))
            golden.update({f"{label}/{structure}/{key}": v for key, v in fields.items()})
    return golden


def main():
    """Train the requested models and write the checkpoints and the reference numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--names", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    golden = {}
    for name in arguments.names:
        path = arguments.output / f"{name}.ckpt"
        with tempfile.TemporaryDirectory() as folder:
            torch.save(strip(train(name, Path(folder))), path)
        golden.update(evaluate(path, name))
        print(f"{name}: {path.stat().st_size / 1000:.0f} kB")
    np.savez_compressed(arguments.output / "golden.npz", **golden)


if __name__ == "__main__":
    main()
