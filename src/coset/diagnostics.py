"""Is this installation sound, and is a data file what it seems to be?"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Float
from torch import Tensor

from coset.edge_model import edge_gradient, forces_and_virial
from coset.neighbors import edge_vectors, neighbor_list
from coset.pet.hypers import CutoffHypers, NetworkHypers, PetHypers, Target
from coset.pet.model import Pet
from coset.repulsion import COVALENT_RADII, UNKNOWN_RADIUS
from coset.structures import Properties, Structures, make_structure

PACKAGES = (
    *("torch", "numpy", "scipy", "ase", "moyopy", "vesin"),
    *("safetensors", "pydantic", "matplotlib", "phonopy", "symfc", "seekpath"),
)
OPTIONAL = ("huggingface-hub", "tensorboard", "metatrain", "metatomic-ase")
PLAUSIBLE = (0.6, 1.8)
SELF_TEST_TOLERANCE = 1e-7
MIN_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """Versions, devices, and the largest force error of the self-test (eV/Å)."""

    python: str
    machine: str
    threads: int
    packages: dict[str, str | None]
    devices: tuple[str, ...]
    force_error: float

    @property
    def sound(self) -> bool:
        """All required packages are there and forces are the gradient of the energy."""
        missing = [name for name in PACKAGES if self.packages[name] is None]
        return not missing and self.force_error < SELF_TEST_TOLERANCE


def inspect_installation() -> Installation:
    """What is installed, which devices there are, and a finite-difference self-test."""
    cuda = range(torch.cuda.device_count())
    return Installation(
        python=platform.python_version(),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        packages={name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        devices=("cpu", *(f"cuda:{k} {torch.cuda.get_device_name(k)}" for k in cuda)),
        force_error=force_error(),
    )


def force_error(step: float = 1e-5) -> float:
    """Largest difference between forces and central differences of a tiny random network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NetworkHypers(d_pet=8, d_node=16, d_head=8, d_feedforward=16, n_heads=2)
        hypers = PetHypers(
            atomic_types=(14,),
            targets=(Target(name="energy", quantity="energy"),),
            network=network,
            cutoff=CutoffHypers(cutoff=4.5, n_neighbors=6.0),
        )
        model = Pet(hypers).double().requires_grad_(False)
    positions = torch.tensor([[0.1, 0.0, 0.2], [1.4, 1.3, 1.2]], dtype=torch.float64)
    cell = torch.tensor([[0, 2.7, 2.8], [2.7, 0, 2.7], [2.6, 2.7, 0]], dtype=torch.float64)

    def at(moved: Float[Tensor, "2 3"]) -> tuple[Tensor, Tensor]:
        one = make_structure(moved, torch.tensor([14, 14]), cell=cell, pbc=(True, True, True))
        graph = neighbor_list(one, 4.5)
        vectors = edge_vectors(one, graph)
        readout, gradient = edge_gradient(model, graph, vectors)
        return readout.atomic_energies.sum(), forces_and_virial(vectors, gradient, graph)[0]

    _, forces = at(positions)
    worst = 0.0
    for atom in range(2):
        for axis in range(3):
            shift = torch.zeros(2, 3, dtype=torch.float64)
            shift[atom, axis] = step
            slope = (at(positions + shift)[0] - at(positions - shift)[0]) / (2.0 * step)
            worst = max(worst, float((slope + forces[atom, axis]).abs()))
    return worst


def suspicious_lengths(one: Structures) -> str | None:
    """What is odd about the nearest distances of one structure, or None.

    Nearest neighbors lie within 0.6 to 1.8 times the sum of covalent radii, whatever the bonding;
    the median ratio tells a file in Bohr, nm or pm from one in Å.
    """
    graph = neighbor_list(one, 8.0)
    if not len(graph.centers):
        return None
    table = torch.full((119,), UNKNOWN_RADIUS, dtype=torch.float64)
    table[: len(COVALENT_RADII)] = torch.tensor(COVALENT_RADII, dtype=torch.float64)
    radii = table[one.atomic_numbers]
    lengths = torch.linalg.vector_norm(edge_vectors(one, graph), dim=1).double()
    ratio = lengths / (radii[graph.centers] + radii[graph.neighbors])
    nearest = torch.full_like(radii, torch.inf)
    nearest = nearest.scatter_reduce(0, graph.centers, ratio, "amin")
    median = float(nearest[torch.isfinite(nearest)].median())
    if PLAUSIBLE[0] <= median <= PLAUSIBLE[1]:
        return None
    return (
        f"nearest distances are {median:.2f} times the sum of covalent radii, expected "
        f"{PLAUSIBLE[0]} to {PLAUSIBLE[1]}: are the lengths in Å?"
    )


def force_consistency(
    frames: Sequence[Structures], labels: Sequence[Properties]
) -> tuple[float, float, int] | None:
    """Correlation and slope of dE against -F.dx between consecutive frames, and how many steps.

    Both are 1 for consistent data; the correlation is -1 for forces of the wrong sign, the slope
    is a ratio of units. None with fewer than four steps between frames of the same atoms and cell.
    """
    changes, works = [], []
    pairs = zip(frames, frames[1:], labels, labels[1:], strict=False)
    for before, after, first, second in pairs:
        same = torch.equal(before.atomic_numbers, after.atomic_numbers)
        if not same or not torch.equal(before.cell, after.cell):
            continue
        if first.energy is None or second.energy is None:
            continue
        if first.forces is None or second.forces is None:
            continue
        moved = after.positions - before.positions
        changes.append(float(second.energy - first.energy))
        works.append(float(-(0.5 * (first.forces + second.forces) * moved).sum()))
    if len(changes) < MIN_STEPS:
        return None
    energy, work = torch.tensor([changes, works], dtype=torch.float64)
    norms = energy.norm() * work.norm()
    if not float(norms):
        return None
    product = float(energy @ work)
    return product / float(norms), product / float(work @ work), len(changes)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
