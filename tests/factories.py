"""Tiny random PET potentials and fixed structures for tests; no file is read, no network used."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from coset.checkpoint import Checkpoint, Provenance
from coset.loading import LoadSettings, potential_of
from coset.pet.hypers import ConditioningHypers, CutoffHypers, NetworkHypers, PetHypers, Target
from coset.potential import ModelPotential
from coset.structures import Structures, concatenate, make_structure

TYPES = (1, 6, 8, 14, 29)
HYPERS = PetHypers(
    atomic_types=TYPES,
    targets=(
        Target(name="energy", quantity="energy"),
        Target(name="direct_forces", quantity="direct_forces"),
        Target(name="direct_stress", quantity="direct_stress"),
    ),
    network=NetworkHypers(
        d_pet=8,
        d_node=16,
        d_head=8,
        d_feedforward=16,
        n_heads=2,
        n_gnn_layers=2,
        n_attention_layers=1,
    ),
    cutoff=CutoffHypers(
        cutoff=5.0, width=0.5, adaptive="converged", n_neighbors=8.0, adaptive_width=1.0
    ),
)
SCALES = {"direct_forces": (0.5, 0.75, 1.0, 1.25, 1.5), "direct_stress": 2.0}
ENERGY_SCALE = 0.5
"""eV; with it forces are of order 1 eV/Å, so that absolute tolerances mean something."""
BIAS = 0.1


def _network(**changes: Any) -> PetHypers:
    return replace(HYPERS, network=replace(HYPERS.network, **changes))


def _cutoff(hypers: PetHypers = HYPERS, **changes: Any) -> PetHypers:
    return replace(hypers, cutoff=replace(hypers.cutoff, **changes))


FIXED: dict[str, Any] = {"cutoff": 4.0, "adaptive": "fixed", "n_neighbors": None}
VARIANTS = {
    "converged": HYPERS,
    "solver10": _cutoff(adaptive="solver10"),
    "grid": _cutoff(adaptive="grid", adaptive_width=0.5),
    "fixed": _cutoff(**FIXED),
    "cosine": _cutoff(function="cosine"),
    "layernorm": _network(normalization="layer", activation="silu", attention_temperature=1.5),
    "postln": _network(norm_placement="post", n_attention_layers=2),
    "residual": _cutoff(
        _network(norm_placement="post", featurizer="residual", d_node=8),
        function="cosine",
        **FIXED,
    ),
    "zbl": replace(HYPERS, zbl=1.0),
    "conditioned": replace(
        HYPERS, conditioning=ConditioningHypers(max_charge=2, max_spin_multiplicity=3)
    ),
    "metatrain": replace(HYPERS, numerics="metatrain", norm_eps=None),
}
"""Networks that differ in one block or a few."""


def random_weights(hypers: PetHypers, seed: int) -> dict[str, torch.Tensor]:
    """Weights in float64 that keep features of order 1: energies depend on directions, too."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in hypers.parameter_shapes().items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weights[name] = center + BIAS * noise
        else:
            table = "embedd" in name and shape[-1] != 4
            weights[name] = noise if table else noise / shape[-1] ** 0.5
    return weights


def tiny_checkpoint(variant: str = "converged", seed: int = 0, **changes: Any) -> Checkpoint:
    """A complete random model in float64; `changes` replace fields of its hyperparameters."""
    hypers = replace(VARIANTS[variant], **changes)
    baseline = {z: -1.0 - 0.1 * z for z in hypers.atomic_types}
    return Checkpoint(
        hypers=hypers,
        weights=random_weights(hypers, seed),
        baseline=dict.fromkeys(hypers.targets_of("energy"), baseline),
        scales={target.name: SCALES.get(target.name, ENERGY_SCALE) for target in hypers.targets},
        provenance=Provenance(name=f"tiny-{variant}"),
    )


def tiny_potential(
    variant: str = "converged", seed: int = 0, dtype: str = "float64", **changes: Any
) -> ModelPotential:
    """A random PET with 8 channels and a cutoff of 4 or 5 Å."""
    settings = LoadSettings(dtype=dtype, device="cpu")
    return potential_of(tiny_checkpoint(variant, seed, **changes), settings)


# Structures


def crystal(
    cell: Any, fractional: Any, numbers: Any, pbc: Any = (True, True, True), **changes: Any
) -> Structures:
    """A batch of one from fractional coordinates."""
    lattice = torch.tensor(np.asarray(cell, dtype=float))
    positions = torch.tensor(np.asarray(fractional, dtype=float)) @ lattice
    return make_structure(positions, torch.tensor(numbers), cell=lattice, pbc=pbc, **changes)


def molecule(positions: Any, numbers: Any, **changes: Any) -> Structures:
    """A batch of one without a cell."""
    return make_structure(
        torch.tensor(np.asarray(positions, dtype=float)), torch.tensor(numbers), **changes
    )


def rattled(structures: Structures, amplitude: float, seed: int = 0) -> Structures:
    """Every atom moved by a normal random vector (Å)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(structures.positions.shape, generator=generator, dtype=torch.float64)
    return replace(structures, positions=structures.positions + amplitude * noise)


FCC = ((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))
BCC = ((-0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.5, 0.5, -0.5))
FCC_SITES = ((0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))
HEXAGONAL = ((1, 0, 0), (-0.5, 0.75**0.5, 0), (0, 0, (8 / 3) ** 0.5))
DIAMOND_SITES = (*FCC_SITES, *((x + 0.25, y + 0.25, z + 0.25) for x, y, z in FCC_SITES))
PROTOTYPES: dict[str, tuple[Any, Any]] = {
    "sc": (np.diag([1.0, 1.0, 2.0]), ((0, 0, 0), (0, 0, 0.5))),
    "bcc": (np.eye(3), ((0, 0, 0), (0.5, 0.5, 0.5))),
    "fcc": (np.eye(3), FCC_SITES),
    "diamond": (np.eye(3), DIAMOND_SITES),
    "hcp": (HEXAGONAL, ((0, 0, 0), (1 / 3, 2 / 3, 0.5))),
}
"""Cell in units of the lattice constant and sites, at least two atoms each."""


def prototype(name: str, lattice_constant: float, number: int = 29) -> Structures:
    """A perfect crystal of one element."""
    cell, sites = PROTOTYPES[name]
    return crystal(lattice_constant * np.asarray(cell), sites, [number] * len(sites))


TRICLINIC = ((3.1, 0.2, -0.4), (0.7, 3.6, 0.3), (-0.5, 0.9, 4.2))
"""Å."""


def triclinic() -> Structures:
    """Four atoms of four elements without any symmetry."""
    sites = ((0.02, 0.03, -0.01), (0.52, 0.47, 0.08), (0.45, 0.06, 0.55), (0.03, 0.56, 0.47))
    return crystal(TRICLINIC, sites, [29, 8, 14, 6])


def _random_crystal(n_atoms: int, seed: int) -> Structures:
    """Atoms of random elements on a randomly thinned, rattled and sheared simple cubic grid."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n_atoms] / side
    cell = 2.3 * side * (np.eye(3) + 0.15 * rng.normal(size=(3, 3)))
    built = crystal(cell, grid, rng.choice(TYPES, n_atoms))
    return rattled(built, 0.15, seed)


def structures() -> dict[str, Structures]:
    """Thirty by name: crystals, slabs, chains, molecules, single atoms; 1 to 32 atoms."""
    a, rng = 3.615, np.random.default_rng(7)
    ring = [
        (r * np.cos(t), r * np.sin(t), 0.0) for r in (1.40, 2.48) for t in np.arange(6) * np.pi / 3
    ]
    methane = 0.63 * np.array([(0, 0, 0), (1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
    left_handed = np.array(TRICLINIC)[[1, 0, 2]]
    slab_cell = np.diag([2.55, 2.7, 0.0])
    slab = ((0.0, 0.0, 0.1), (1.3, 1.3, 1.8), (0.1, 0.05, 3.7))
    chain = ((0.2, 0.1, -0.3), (-0.5, 0.4, 1.2))
    four = triclinic()
    return {
        "fcc": crystal(a * np.array(FCC), [(0, 0, 0)], [29]),
        "bcc": crystal(2.9 * np.array(BCC), [(0, 0, 0)], [29]),
        "sc": crystal(2.4 * np.eye(3), [(0, 0, 0)], [14]),
        "hcp": prototype("hcp", 2.56),
        "diamond": crystal(5.43 * np.array(FCC), [(0, 0, 0), (0.25, 0.25, 0.25)], [14, 14]),
        "rocksalt": crystal(4.25 * np.array(FCC), [(0, 0, 0), (0.5, 0.5, 0.5)], [29, 8]),
        "fcc rattled": rattled(prototype("fcc", a), 0.1),
        "diamond rattled": rattled(prototype("diamond", 5.43, 14), 0.1),
        "nearly perfect": rattled(prototype("fcc", a), 1e-3),
        "triclinic": four,
        "left-handed": crystal(left_handed, [(0, 0, 0), (0.4, 0.6, 0.5)], [29, 6]),
        "skewed": crystal(
            [(3.0, 0, 0), (2.6, 1.5, 0), (2.6, 0.7, 1.4)], [(0, 0, 0), (0.5, 0.5, 0.5)], [6, 14]
        ),
        "perovskite": rattled(
            crystal(
                3.9 * np.eye(3),
                [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)],
                [29, 14, 8, 8, 8],
            ),
            0.05,
        ),
        "layers": rattled(
            crystal(
                2.46 * np.array([(1, 0, 0), (-0.5, 0.75**0.5, 0), (0, 0, 2.7)]),
                [(0, 0, 0), (1 / 3, 2 / 3, 0), (0, 0, 0.5), (2 / 3, 1 / 3, 0.5)],
                [6] * 4,
            ),
            0.03,
        ),
        "one atom, many images": crystal(1.7 * np.eye(3), [(0, 0, 0)], [1]),
        "sparse": crystal(6.1 * np.eye(3), [(0, 0, 0)], [29]),
        "slab": make_structure(
            torch.tensor(slab, dtype=torch.float64),
            torch.tensor([29, 8, 14]),
            cell=torch.tensor(slab_cell),
            pbc=(True, True, False),
        ),
        "slab, open first": make_structure(
            torch.tensor(slab, dtype=torch.float64)[:, [2, 0, 1]],
            torch.tensor([29, 8, 14]),
            cell=torch.tensor(
                [(1.0, 2.0, 3.0), (0.3, 2.5, 0.4), (0.2, 0.5, 2.9)], dtype=torch.float64
            ),
            pbc=(False, True, True),
        ),
        "chain": make_structure(
            torch.tensor(chain, dtype=torch.float64),
            torch.tensor([6, 1]),
            cell=torch.diag(torch.tensor([0.0, 0.0, 2.5])).double(),
            pbc=(False, False, True),
        ),
        "chain along a": make_structure(
            torch.tensor(chain, dtype=torch.float64)[:, [2, 1, 0]],
            torch.tensor([6, 8]),
            cell=torch.tensor([(2.4, 0.6, 0.1), (0, 0, 0), (0, 0, 0)], dtype=torch.float64),
            pbc=(True, False, False),
        ),
        "ring": molecule(ring, [6] * 6 + [1] * 6),
        "methane": rattled(molecule(methane, [6, 1, 1, 1, 1]), 0.05),
        "water": molecule([(0, 0, 0), (0.76, 0.59, 0.02), (-0.77, 0.58, 0)], [8, 1, 1]),
        "dimer": molecule([(0.3, -0.2, 0.1), (1.2, 0.9, 0.7)], [29, 14]),
        "atom": molecule([(1.0, 2.0, 3.0)], [29]),
        "atom in a box": crystal(30.0 * np.eye(3), [(0.3, 0.4, 0.5)], [29]),
        "unwrapped": replace(
            four,
            positions=four.positions
            + torch.tensor(rng.integers(-9, 10, (4, 3))).double() @ four.cell[0],
        ),
        "six": _random_crystal(6, 1),
        "twelve": _random_crystal(12, 2),
        "thirty-two": _random_crystal(32, 3),
    }


def all_structures() -> Structures:
    """The thirty structures in one batch."""
    return concatenate(list(structures().values()))


def fail_once(monkeypatch: Any, owner: Any, name: str, error: Exception) -> None:
    """The first call of a function of a module raises; the later ones work."""
    works, errors = getattr(owner, name), [error]

    def function(*args: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return works(*args, **options)

    monkeypatch.setattr(owner, name, function)
