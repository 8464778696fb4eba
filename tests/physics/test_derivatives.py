"""Forces, stress, torque, Hessians and D(q) against differences and supercells, float64."""

from dataclasses import replace
from functools import cache
from itertools import permutations, product

import numpy as np
import pytest
import tolerances
import torch
from factories import (
    HYPERS,
    PROTOTYPES,
    VARIANTS,
    prototype,
    rattled,
    structures,
    tiny_potential,
    triclinic,
)
from scipy.spatial.transform import Rotation

from coset.edge_model import INDEXING, Outputs, Quadrature, edge_gradient
from coset.neighbors import edge_vectors, neighbor_list
from coset.structures import Structures, concatenate, deform, properties_of, repeat, rotate

POOL = structures()
STEPS = (1e-3, 1e-4, 1e-5)
FEW = ("triclinic", "slab, open first", "methane", "hcp", "six")


def copies(one, positions):
    """A batch of one structure with its atoms at each of [copies, atoms, 3] positions."""
    count, n_atoms, _ = positions.shape
    return Structures(
        positions=positions.reshape(-1, 3),
        atomic_numbers=one.atomic_numbers.repeat(count),
        cell=one.cell.repeat(count, 1, 1),
        pbc=one.pbc.repeat(count, 1),
        system_index=torch.arange(count).repeat_interleave(n_atoms),
        charge=one.charge.repeat(count),
        spin_multiplicity=one.spin_multiplicity.repeat(count),
    )


def displaced(one, directions, steps):
    """Copies of a structure moved by +h v and -h v: [steps, directions, signs] in this order."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    h = torch.tensor(steps, dtype=torch.float64)
    moves = torch.einsum("s,p,dax->sdpax", h, signs, directions)
    return copies(one, (one.positions + moves).reshape(-1, *one.positions.shape))


def central_differences(energies, n_directions, steps):
    """[steps, directions] from the energies of `displaced`."""
    pairs = energies.reshape(len(steps), n_directions, 2)
    return (pairs[..., 0] - pairs[..., 1]) / (2 * torch.tensor(steps, dtype=torch.float64)[:, None])


def unit_directions(one, seed=0):
    """Every component of up to four atoms (of three chosen at random in larger structures)."""
    n_atoms = len(one.positions)
    atoms = range(n_atoms)
    if n_atoms > 4:
        atoms = np.random.default_rng(seed).choice(n_atoms, 3, replace=False)
    directions = torch.zeros(3 * len(atoms), n_atoms, 3, dtype=torch.float64)
    for row, (atom, axis) in enumerate(product(atoms, range(3))):
        directions[row, atom, axis] = 1.0
    return directions


def force_errors(potential, members, directions, steps):
    """Largest |F.v - difference| at every step, [members, steps]; all copies in one batch."""
    plain = replace(potential, forces=False)
    forces = potential(concatenate(members)).forces
    batch = [displaced(one, v, steps) for one, v in zip(members, directions, strict=True)]
    energies = plain(concatenate(batch)).energy
    errors, atom, copy = [], 0, 0
    for one, v in zip(members, directions, strict=True):
        exact = torch.einsum("ax,dax->d", forces[atom : atom + len(one.positions)], v)
        count = 2 * len(v) * len(steps)
        numerical = -central_differences(energies[copy : copy + count], len(v), steps)
        errors.append((numerical - exact).abs().amax(1))
        atom, copy = atom + len(one.positions), copy + count
    return torch.stack(errors)


# First derivatives


@cache
def errors_of_the_pool():
    members = list(POOL.values())
    directions = [unit_directions(one) for one in members]
    return force_errors(tiny_potential("converged"), members, directions, STEPS)


def test_forces_are_the_gradient_in_thirty_structures():
    errors = errors_of_the_pool()
    assert len(errors) == 30
    assert float(errors.amin(1).max()) <= tolerances.FORCE_DIFFERENCE


def test_differences_converge_with_the_square_of_the_step():
    """Slope 2 where rounding is far below: a kink, which a single step can hide, has slope 1."""
    errors = errors_of_the_pool()
    seen = errors[:, 1] > 1e-8
    slopes = torch.log10(errors[seen, 0] / errors[seen, 1])
    assert int(seen.sum()) > 15
    assert float((slopes - 2).abs().max()) < 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_forces_are_the_gradient_for_every_network(variant):
    members = [POOL[name] for name in FEW]
    if VARIANTS[variant].conditioning is not None:
        members = [charged(one) for one in members]
    if VARIANTS[variant].zbl:
        members = [*members, squeezed()]
    directions = [unit_directions(one, seed=1) for one in members]
    errors = force_errors(tiny_potential(variant, seed=1), members, directions, STEPS)
    assert float(errors.amin(1).max()) <= tolerances.FORCE_DIFFERENCE


def charged(one):
    return replace(one, charge=one.charge - 1, spin_multiplicity=one.spin_multiplicity + 1)


def squeezed():
    """Atoms near enough for the short-range repulsion."""
    one = triclinic()
    return replace(one, positions=0.7 * one.positions, cell=0.7 * one.cell)


def fourth_order(plain, make, h):
    """Derivative at 0 of the energies of `make(t)`, a batch for every t: [systems]."""
    batches = [make(t) for t in (h, -h, 2 * h, -2 * h)]
    n_systems = len(batches[0])
    near_up, near_down, far_up, far_down = plain(concatenate(batches)).energy.split(n_systems)
    return (8 * (near_up - near_down) - (far_up - far_down)) / (12 * h)


@cache
def whole_pool(variant="converged"):
    batch = concatenate(list(POOL.values()))
    potential = tiny_potential(variant)
    return batch, replace(potential, forces=False), potential(batch)


def test_stress_is_the_strain_derivative():
    """All nine components (1/V) dE/de_ab, symmetrized; NaN unless periodic in three directions."""
    batch, plain, result = whole_pool()
    numerical = torch.zeros(len(batch), 3, 3, dtype=torch.float64)
    for a, b in product(range(3), repeat=2):
        unit = torch.zeros(3, 3, dtype=torch.float64)
        unit[a, b] = 1.0

        def strained(t, unit=unit):
            return deform(batch, (torch.eye(3).double() + t * unit).expand(len(batch), 3, 3))

        numerical[:, a, b] = fourth_order(plain, strained, 1e-4)
    periodic = batch.pbc.all(1)
    expected = 0.5 * (numerical + numerical.mT) / batch.volume[:, None, None]
    assert int(periodic.sum()) == 21
    assert torch.equal(result.stress.isnan().all((1, 2)), ~periodic)
    error = (result.stress - expected)[periodic].abs().max()
    assert float(error) <= tolerances.STRESS_DIFFERENCE
    assert torch.equal(result.stress[periodic], result.stress[periodic].mT)
    assert float(result.stress[periodic].abs().max()) > 0.1


def test_torque_is_the_derivative_under_rotation():
    """dE = n.torque dt for x -> exp(t [n]) x of atoms and cells, in every structure."""
    batch, plain, result = whole_pool()
    for axis in range(3):
        vector = np.eye(3)[axis]

        def turned(t, vector=vector):
            return rotate(batch, torch.tensor(Rotation.from_rotvec(t * vector).as_matrix()))

        numerical = fourth_order(plain, turned, 2e-4)
        error = (result.torque[:, axis] - numerical).abs().max()
        assert float(error) <= tolerances.TORQUE_DIFFERENCE
    assert float(result.torque.abs().max()) > 1.0


def test_a_compressed_crystal_pushes_back():
    """Stress is positive in tension: dE/dV at fixed shape is its mean diagonal."""
    one, potential = prototype("fcc", 3.5), tiny_potential("converged")
    h, identity = 1e-4, torch.eye(3).double()[None]
    larger, smaller = (deform(one, (1 + t) * identity) for t in (h, -h))
    energy = potential(concatenate([larger, smaller])).energy
    slope = float((energy[0] - energy[1]) / (larger.volume - smaller.volume)[0])
    mean = float(torch.diagonal(potential(one).stress[0]).mean())
    assert abs(mean) > 0.01
    assert mean == pytest.approx(slope, abs=1e-6)


# Perfect crystals, where whole shells enter a neighborhood at once

WIDE = replace(HYPERS.cutoff, cutoff=10.0, n_neighbors=40.0, adaptive_width=1.0)
FINE_STEPS = (1e-4, 1e-5, 1e-6)


def scan_errors(potential, name, constants):
    """At best step, for every lattice constant: atoms moved by 1e-3 Å, along a random direction."""
    members = [rattled(prototype(name, a), 1e-3, seed) for seed, a in enumerate(constants)]
    directions = []
    for seed, one in enumerate(members):
        generator = torch.Generator().manual_seed(1000 + seed)
        v = torch.randn(1, *one.positions.shape, generator=generator, dtype=torch.float64)
        directions.append(v / torch.linalg.norm(v))
    return force_errors(potential, members, directions, FINE_STEPS).amin(1)


@pytest.mark.parametrize("name", PROTOTYPES)
def test_crystal_scan(name):
    errors = scan_errors(tiny_potential("converged"), name, np.linspace(2.2, 7.0, 20))
    assert float(errors.max()) <= tolerances.FORCE_DIFFERENCE


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOTYPES)
@pytest.mark.parametrize("cutoff", [HYPERS.cutoff, WIDE], ids=["N8", "N40"])
def test_fine_crystal_scan(name, cutoff):
    potential = tiny_potential("converged", cutoff=cutoff)
    errors = scan_errors(potential, name, np.linspace(2.2, 7.0, 200))
    assert float(errors.max()) <= tolerances.FORCE_DIFFERENCE


def test_solver10_breaks_where_converged_holds():
    """bcc, a = 4.8621 Å: ten steps stop 0.57 Å off the root, and forces are no gradient there."""
    constants = [4.8621]
    own = {
        method: tiny_potential("converged", cutoff=replace(WIDE, adaptive=method))
        for method in ("converged", "solver10")
    }
    errors = {m: float(scan_errors(p, "bcc", constants).max()) for m, p in own.items()}
    assert errors["converged"] <= tolerances.FORCE_DIFFERENCE
    assert errors["solver10"] > 1e-4
