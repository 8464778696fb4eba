"""Write the losses of metatrain's own PET trainer and their gradients, as reference numbers.

Usage: python make_metatrain_loss.py FOLDER

Made with metatrain 2026.4, metatomic-torch 0.1.19, metatensor-torch 0.10.8, torch 2.13.0 (CPU), ase
3.29.0, numpy 2.4.6, Python 3.11.

The trainer of metatrain runs in float64 as it is, from reading the data to the gradient of its
first batch, which holds all structures. Two of its calls are replaced: structures are not rotated
at random, and where it would clip the gradient it stops. Every network is trained with every loss;
for each FOLDER gets `<network>-<loss>.ckpt`, the model as the trainer had it, and `.npz` with keys
`weight/<term>`, `delta/<term>`, `loss/<term>` (weighted) and `gradient/<parameter>` (of the sum).
`structures.npz` holds the structures and their labels in flat arrays; what is missing is NaN.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc100
from metatrain.pet import PET, Trainer
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.augmentation import O3Augmenter
from metatrain.utils.data import DatasetInfo, get_dataset
from metatrain.utils.loss import LossAggregator
from metatrain.utils.omegaconf import expand_dataset_config
from omegaconf import OmegaConf

ELEMENTS = ("Al", "Ni", "Cu", "Au")
NUMBERS = (13, 28, 29, 79)
SMALL = dict(
    cutoff=5.0, cutoff_width=0.5, cutoff_function="Bump", num_neighbors_adaptive=8,
    adaptive_cutoff_method="solver", cutoff_width_adaptive=1.0, d_pet=4, d_node=8, d_head=4,
    d_feedforward=8, num_heads=2, num_gnn_layers=2, num_attention_layers=2,
)  # fmt: skip
NETWORKS = {
    "solver": SMALL,
    "fixed": dict(
        SMALL, cutoff=4.5, num_neighbors_adaptive=None, cutoff_function="Cosine",
        normalization="LayerNorm", activation="SiLU", transformer_type="PostLN",
        featurizer_type="residual", d_node=4,
    ),
    "zbl": dict(SMALL, cutoff=4.5, num_neighbors_adaptive=None, zbl=True),
}  # fmt: skip

LOSSES = {
    "direct": {"energy": (0.01, 1.7), "direct_forces": (1.0, 1.5), "direct_stress": (0.01, 0.3)},
    "conservative": {"energy": (1.0, 1.7), "forces": (2.0, 1.2), "virial": (3.0, 0.6)},
    "both": {
        "energy": (1.0, 1.7),
        "forces": (1.5, 1.5),
        "virial": (0.5, 0.8),
        "direct_forces": (0.01, 1.2),
        "direct_stress": (0.001, 0.4),
    },
}
"""Weight and Huber delta of every term, chosen so that errors lie on both sides of delta."""

TERMS = {
    "energy": "energy",
    "energy_grad_positions": "forces",
    "energy_grad_strain": "virial",
    "non_conservative_forces": "direct_forces",
    "non_conservative_stress": "direct_stress",
}
"""Name of a term in metatrain and in the files."""

ENERGY_SCALE, STRESS_SCALE = 0.7, 0.05
VOLUME = 15.0
"""Å³ per atom, roughly: virials per atom are of the size of energies per atom."""

FORCE_SCALES = dict(zip(NUMBERS, (0.5, 0.8, 1.1, 1.7), strict=True))
BASELINE = dict(zip(NUMBERS, (-3.1, -5.2, -4.3, -2.4), strict=True))


class GradientReadyError(Exception):
    """The trainer has its gradient: there is nothing more to run."""


def structures():
    """Return crystals, a slab, a molecule and an atom, all without labels."""
    rng = np.random.default_rng(5)
    crystal = bulk("Cu", "fcc", a=3.8, cubic=True)
    crystal.symbols[:] = ELEMENTS
    crystal.set_cell(crystal.cell @ (np.eye(3) + 0.05 * rng.normal(size=(3, 3))), scale_atoms=True)
    double = crystal.repeat((2, 1, 1))
    sparse = bulk("Au", "fcc", a=5.1, cubic=True)
    slab = fcc100("Cu", (2, 2, 3), a=3.7, vacuum=8.0)
    slab.symbols[[0, 5, 11]] = ["Au", "Ni", "Al"]
    slab.pbc = (True, True, False)
    molecule = Atoms("Cu2AlNi", [[0, 0, 0], [2.3, 0, 0], [0.1, 2.4, 0.3], [1.1, 1.0, 2.0]])
    frames = [crystal, double, bulk("Al", "fcc", a=4.05), sparse, slab, molecule, Atoms("Au")]
    for atoms in frames:
        if len(atoms) > 1:
            atoms.positions += 0.1 * rng.normal(size=atoms.positions.shape)
    return frames


def labelled(frames):
    """Return the structures with random labels E (eV), F (eV/Å) and S (eV/Å³).

    The second has no energy, the third no forces, the fourth and those that are no crystals no
    stress.
    """
    rng = np.random.default_rng(6)
    for row, atoms in enumerate(frames):
        n_atoms = len(atoms)
        baseline = sum(BASELINE[number] for number in atoms.numbers)
        energy = baseline + n_atoms * ENERGY_SCALE * rng.normal()
        stress = rng.normal(size=(3, 3)) * ENERGY_SCALE / VOLUME
        stress += stress.T
        forces = rng.normal(size=(n_atoms, 3))
        has_stress = atoms.pbc.all() and row != 3
        atoms.info["E"] = energy if row != 1 else np.nan
        atoms.info["S"] = stress.ravel() if has_stress else np.full(9, np.nan)
        atoms.arrays["F"] = forces if row != 2 else np.full_like(forces, np.nan)
    return frames


def flat_arrays(frames):
    """Return structures and labels in flat arrays."""
    return dict(
        n_atoms=[len(atoms) for atoms in frames],
        numbers=np.concatenate([atoms.numbers for atoms in frames]),
        positions=np.concatenate([atoms.positions for atoms in frames]),
        cell=[atoms.cell.array for atoms in frames],
        pbc=[atoms.pbc for atoms in frames],
        energy=[atoms.info["E"] for atoms in frames],
        forces=np.concatenate([atoms.arrays["F"] for atoms in frames]),
        stress=[np.reshape(atoms.info["S"], (3, 3)) for atoms in frames],
    )


def targets(terms):
    """Return the target section of the options for a loss."""
    section = {
        "energy": {
            "quantity": "energy",
            "key": "E",
            "unit": "eV",
            "forces": {"key": "F"} if "forces" in terms else False,
            "stress": {"key": "S"} if "virial" in terms else False,
        }
    }
    if "direct_forces" in terms:
        section["non_conservative_forces"] = dict(
            key="F", quantity="force", unit="eV/A", sample_kind="atom",
            type={"cartesian": {"rank": 1}},
        )  # fmt: skip
    if "direct_stress" in terms:
        section["non_conservative_stress"] = dict(
            key="S", quantity="pressure", unit="eV/A^3", type={"cartesian": {"rank": 2}}
        )
    return section


def loss_options(terms):
    """Return the loss section of the training options."""
    huber = {
        name: dict(type="huber", reduction="mean", weight=weight, delta=delta)
        for name, (weight, delta) in terms.items()
    }
    gradients = {
        name: huber[term]
        for name, term in (("positions", "forces"), ("strain", "virial"))
        if term in terms
    }
    options = {"energy": {**huber["energy"], "gradients": gradients}}
    for term in ("direct_forces", "direct_stress"):
        if term in terms:
            options[f"non_conservative_{term[7:]}"] = {**huber[term], "gradients": {}}
    return options


def training_options(terms, n_structures):
    """Return the hyperparameters of the trainer."""
    scales = {
        "energy": ENERGY_SCALE,
        "non_conservative_forces": FORCE_SCALES,
        "non_conservative_stress": STRESS_SCALE,
    }
    options = get_default_hypers("pet")["training"]
    options.update(
        batch_size=n_structures, num_epochs=1, num_workers=0, loss=loss_options(terms),
        atomic_baseline={"energy": BASELINE}, per_structure_targets=["non_conservative_stress"],
        fixed_scaling_weights={name: scales[name] for name in targets(terms)},
    )  # fmt: skip
    return options


def first_gradient(network, terms, data):
    """Return trainer, model and weighted terms of the loss, after the first backward pass."""
    section = {
        "systems": {"read_from": str(data), "length_unit": "angstrom"},
        "targets": targets(terms),
    }
    dataset, target_info, _ = get_dataset(expand_dataset_config(OmegaConf.create(section))[0])
    info = DatasetInfo(length_unit="angstrom", atomic_types=list(NUMBERS), targets=target_info)
    torch.manual_seed(1)
    model = PET({**get_default_hypers("pet")["model"], **network}, info)
    trainer = Trainer(training_options(terms, len(dataset)))
    values = {}
    compute = LossAggregator.compute

    def remember(self, predictions, labels, extra_data=None):
        for name, term in self.losses.items():
            values[TERMS[name]] = term.weight * term.compute(predictions, labels, extra_data).item()
        return compute(self, predictions, labels, extra_data)

    def unchanged(self, systems, labels, extra_data=None):
        return systems, labels, extra_data or {}

    with (
        mock.patch.object(LossAggregator, "compute", remember),
        mock.patch.object(O3Augmenter, "apply_random_augmentations", unchanged),
        mock.patch("torch.nn.utils.clip_grad_norm_", side_effect=GradientReadyError),
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            trainer.train(model, torch.float64, [torch.device("cpu")], [dataset], [dataset], folder)
        except GradientReadyError:
            return trainer, model, values
    raise RuntimeError("the trainer never came to clip a gradient")


def save_model(trainer, model, path):
    """Write the checkpoint of a model as the trainer does after its best epoch."""
    trainer.best_model_state_dict = model.state_dict()
    trainer.epoch = trainer.best_epoch = 0
    trainer.save_checkpoint(model, path)


def main(folder):
    """Write structures, checkpoints and reference numbers."""
    data = folder / "data.xyz"
    ase.io.write(data, labelled(structures()))
    # Numbers are rounded in the file, so they are read as the trainer reads them.
    np.savez(folder / "structures.npz", **flat_arrays(ase.io.read(data, ":")))
    for network, hypers in NETWORKS.items():
        for loss, terms in LOSSES.items():
            trainer, model, values = first_gradient(hypers, terms, data)
            save_model(trainer, model, folder / f"{network}-{loss}.ckpt")
            arrays = {f"loss/{term}": value for term, value in values.items()}
            for term, (weight, delta) in terms.items():
                arrays |= {f"weight/{term}": weight, f"delta/{term}": delta}
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    arrays[f"gradient/{name}"] = parameter.grad.numpy()
            np.savez(folder / f"{network}-{loss}.npz", **arrays)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
