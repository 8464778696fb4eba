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
    h = torch.tensor(steps, dtype=torch.float64)
    return (pairs[..., 0] - pairs[..., 1]) / (2 * h[:, None])


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
    assert int(seen.sum()) >= 15
    assert float((slopes - 2).abs().max()) < 0.05


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


# Second derivatives, through the seam


def leaf_gradient(potential, one, exchange=INDEXING):
    """Edge vectors as a leaf, and dE/dr that can be differentiated again."""
    graph = neighbor_list(one, potential.cutoff)
    r = edge_vectors(one, graph).requires_grad_()
    _, gradient = edge_gradient(
        potential.model,
        graph,
        r,
        potential.quadrature,
        outputs=potential.outputs,
        exchange=exchange,
        create_graph=True,
    )
    return graph, r, gradient


def hessian(potential, one):
    """d2E/dx_ia dx_jb as [3 atoms, 3 atoms]: all columns by one vmap over the backward pass."""
    graph, r, gradient = leaf_gradient(potential, one)
    n_atoms = len(one.positions)
    seeds = torch.zeros(n_atoms, 3, len(r), 3, dtype=torch.float64)
    for atom, axis in product(range(n_atoms), range(3)):
        seeds[atom, axis, graph.neighbors == atom, axis] += 1.0
        seeds[atom, axis, graph.centers == atom, axis] -= 1.0

    def column(seed):
        return torch.autograd.grad(gradient, r, seed, retain_graph=True)[0]

    curvature = torch.func.vmap(column)(seeds.flatten(0, 1))
    columns = curvature.new_zeros(len(curvature), n_atoms, 3)
    columns = columns.index_add(1, graph.neighbors, curvature)
    columns = columns.index_add(1, graph.centers, curvature, alpha=-1)
    return columns.flatten(1).mT


def numerical_hessian(potential, one, h=2e-4):
    """Fourth-order differences of forces, all copies in one batch."""
    directions = torch.eye(3 * len(one.positions), dtype=torch.float64)
    directions = directions.reshape(len(directions), -1, 3)
    forces = potential(displaced(one, directions, (h, 2 * h))).forces
    near, far = forces.reshape(2, len(directions), 2, -1)
    near, far = (f[:, 0] - f[:, 1] for f in (near, far))
    return -(8 * near - far).mT / (12 * h)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hessian_is_the_difference_of_forces(variant):
    """A triclinic cell: with one implicit step of the adaptive cutoff it is wrong by 1e-2."""
    one = triclinic()
    if VARIANTS[variant].conditioning is not None:
        one = charged(one)
    if VARIANTS[variant].zbl:
        one = squeezed()
    potential = tiny_potential(variant, seed=2)
    exact = hessian(potential, one)
    error = (exact - numerical_hessian(potential, one)).abs().max()
    assert float(error) <= tolerances.HESSIAN_DIFFERENCE
    assert float(exact.abs().max()) > 0.5
    scale = max(1.0, float(exact.abs().max()))
    assert float((exact - exact.mT).abs().max()) <= tolerances.SAME_ALGEBRA * scale
    rows = exact.reshape(12, 4, 3).sum(1)
    assert float(rows.abs().max()) <= tolerances.SAME_ALGEBRA * scale


def test_the_squeezed_cell_feels_the_repulsion():
    one = squeezed()
    with_, without = tiny_potential("zbl", seed=2), tiny_potential("converged", seed=2)
    assert float(with_(one).energy - without(one).energy) > 1.0


@pytest.mark.parametrize("name", ["slab, open first", "methane", "fcc"])
def test_hessian_of_other_systems(name):
    """An open direction, no cell, and one atom whose edges all lead to itself."""
    one, potential = POOL[name], tiny_potential("converged")
    exact = hessian(potential, one)
    error = (exact - numerical_hessian(potential, one)).abs().max()
    assert float(error) <= tolerances.HESSIAN_DIFFERENCE
    assert float((exact - exact.mT).abs().max()) <= tolerances.SAME_ALGEBRA


def test_third_derivatives():
    """Differences of Hessians, for the force constants of third order: (H v)' along another v."""
    one = triclinic()
    for variant in ("converged", "layernorm"):
        potential = tiny_potential(variant)
        graph, r, gradient = leaf_gradient(potential, one)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(r.shape, generator=generator, dtype=torch.float64)
        (second,) = torch.autograd.grad(gradient, r, v, create_graph=True)
        (third,) = torch.autograd.grad(second, r, v)

        def hessian_vector(moved, potential=potential, graph=graph, v=v):
            leaf = moved.detach().requires_grad_()
            _, g = edge_gradient(
                potential.model, graph, leaf, outputs=potential.outputs, create_graph=True
            )
            return torch.autograd.grad(g, leaf, v)[0]

        base, h = r.detach(), 1e-4
        near = hessian_vector(base + h * v) - hessian_vector(base - h * v)
        far = hessian_vector(base + 2 * h * v) - hessian_vector(base - 2 * h * v)
        numerical = (8 * near - far) / (12 * h)
        scale = float(third.abs().max())
        assert scale > 1.0
        assert float((third - numerical).abs().max()) < 1e-5 * scale


# D(q) from the primitive cell: the exchange carries all that q needs


class Bloch:
    """The exchange of a perturbation exp(2 pi i q.S): plain forward, phases under vmap alone.

    The batch of vmap is (real, imaginary) pairs, one q per pair.
    """

    def __init__(self):
        self.q = torch.zeros(0, 3, dtype=torch.float64)

    def reverse(self, messages, graph):
        turned = Gather.apply(messages.transpose(0, 1), graph.reverse, graph.cell_shifts, self)
        return turned.transpose(0, 1)

    def to_neighbors(self, values, graph):
        return Gather.apply(values, graph.neighbors, graph.cell_shifts, self)

    def turned(self, values, shifts, sign):
        """[pairs of (re, im), edges, ...] times exp(sign 2 pi i q.S)."""
        angles = sign * 2 * torch.pi * self.q @ shifts.to(self.q).mT
        angles = angles.reshape(*angles.shape, *[1] * (values.ndim - 2))
        real, imaginary = values[0::2], values[1::2]
        c, s = torch.cos(angles), torch.sin(angles)
        parts = (c * real - s * imaginary, s * real + c * imaginary)
        return torch.stack(parts, dim=1).reshape(values.shape)


class Gather(torch.autograd.Function):
    """values[index]; a response of the neighbor lies in another cell."""

    @staticmethod
    def forward(values, index, shifts, bloch):
        return values[index]

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, index, shifts, ctx.bloch = inputs
        ctx.n_rows = len(values)
        ctx.save_for_backward(index, shifts)

    @staticmethod
    def backward(ctx, grad):
        return Scatter.apply(grad, *ctx.saved_tensors, ctx.n_rows, ctx.bloch), None, None, None

    @staticmethod
    def vmap(info, in_dims, values, index, shifts, bloch):
        picked = values.movedim(in_dims[0], 0)[:, index]
        return bloch.turned(picked, shifts, 1.0), 0


class Scatter(torch.autograd.Function):
    """The transpose of `Gather`: sums of the rows with the same index."""

    @staticmethod
    def forward(rows, index, shifts, n_rows, bloch):
        return rows.new_zeros(n_rows, *rows.shape[1:]).index_add(0, index, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, index, shifts, _, ctx.bloch = inputs
        ctx.save_for_backward(index, shifts)

    @staticmethod
    def backward(ctx, grad):
        return Gather.apply(grad, *ctx.saved_tensors, ctx.bloch), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, rows, index, shifts, n_rows, bloch):
        turned = bloch.turned(rows.movedim(in_dims[0], 0), shifts, -1.0)
        empty = turned.new_zeros(len(turned), n_rows, *turned.shape[2:])
        return empty.index_add(1, index, turned), 0


def dynamical_matrix(potential, one, q):
    """Sum over S of Phi(j 0, j' S) exp(2 pi i q.S), from one cell: [3 atoms, 3 atoms], complex."""
    bloch = Bloch()
    graph, r, gradient = leaf_gradient(potential, one, bloch)
    n_atoms = len(one.positions)
    q = torch.tensor(q, dtype=torch.float64)
    bloch.q = q.expand(3 * n_atoms, 3)
    phase = torch.exp(2j * torch.pi * (graph.cell_shifts.double() @ q))
    seeds = torch.zeros(n_atoms, 3, 2, len(r), 3, dtype=torch.float64)
    for atom, axis in product(range(n_atoms), range(3)):
        bra = phase * (graph.neighbors == atom) - (graph.centers == atom).to(phase)
        seeds[atom, axis, 0, :, axis], seeds[atom, axis, 1, :, axis] = bra.real, bra.imag

    def column(seed):
        return torch.autograd.grad(gradient, r, seed, retain_graph=True)[0]

    pairs = torch.func.vmap(column)(seeds.flatten(0, 2))
    curvature = torch.complex(pairs[0::2], pairs[1::2])
    columns = curvature.new_zeros(3 * n_atoms, n_atoms, 3)
    columns = columns.index_add(1, graph.neighbors, phase.conj()[:, None] * curvature)
    columns = columns.index_add(1, graph.centers, curvature, alpha=-1)
    return columns.flatten(1).mT


def folded(potential, one, repeats, q):
    """The same from the Hessian of a supercell, in which atom j of cell S is row S n_atoms + j."""
    n_atoms = len(one.positions)
    full = hessian(potential, repeat(one, repeats))
    cells = torch.cartesian_prod(*[torch.arange(n) for n in repeats]).double()
    blocks = full.reshape(len(cells), 3 * n_atoms, len(cells), 3 * n_atoms)[0]
    phase = torch.exp(2j * torch.pi * (cells @ torch.tensor(q, dtype=torch.float64)))
    return torch.einsum("xsy,s->xy", blocks.to(phase), phase)


COMMENSURATE = {
    (2, 1, 1): (0.5, 0.0, 0.0),
    (3, 1, 1): (1 / 3, 0.0, 0.0),
    (2, 1, 2): (0.5, 0.0, 0.5),
    (1, 4, 1): (0.0, 0.25, 0.0),
}


@pytest.mark.parametrize("variant", ["converged", "grid", "solver10", "residual", "layernorm"])
@pytest.mark.parametrize("repeats", COMMENSURATE)
def test_bloch_phases_give_the_folded_hessian(variant, repeats):
    """Second derivatives cross between cells only in the exchange."""
    one, potential, q = triclinic(), tiny_potential(variant), COMMENSURATE[repeats]
    found = dynamical_matrix(potential, one, q)
    error = (found - folded(potential, one, repeats, q)).abs().max()
    assert float(error) <= tolerances.FOLDED_HESSIAN
    assert float((found - found.mH).abs().max()) <= tolerances.SAME_ALGEBRA
    gamma = hessian(potential, one)
    assert float((found - gamma).abs().max()) > 0.01


def test_bloch_phases_at_a_general_q():
    """Without a supercell to compare: Hermitian, conjugate at -q, Γ at 0, one atom with itself."""
    for name in ("triclinic", "fcc", "diamond"):
        one, potential, q = POOL[name], tiny_potential("converged"), (0.13, 0.27, 0.41)
        found = dynamical_matrix(potential, one, q)
        assert float((found - found.mH).abs().max()) <= tolerances.SAME_ALGEBRA
        mirrored = dynamical_matrix(potential, one, tuple(-x for x in q))
        assert float((mirrored - found.conj()).abs().max()) <= tolerances.SAME_ALGEBRA
        gamma = dynamical_matrix(potential, one, (0.0, 0.0, 0.0))
        assert float((gamma - hessian(potential, one)).abs().max()) <= tolerances.SAME_ALGEBRA
        assert float(found.abs().max()) > 0.01


# Quadrature


def octahedral_rotations():
    """The 24 proper rotations that map the axes to axes."""
    signed = [
        np.diag(signs)[list(order)]
        for order in permutations(range(3))
        for signs in product((1.0, -1.0), repeat=3)
    ]
    return torch.tensor(np.array([m for m in signed if np.linalg.det(m) > 0]))


def random_rotations(*shape, seed=0):
    """Rotations and, in every second row, rotations with inversion."""
    turns = Rotation.random(int(np.prod(shape)), rng=np.random.default_rng(seed)).as_matrix()
    turns[1::2] *= -1
    return torch.tensor(turns).reshape(*shape, 3, 3)


def all_outputs(potential, **changes):
    names = Outputs(
        energy=("energy",), direct_forces="direct_forces", direct_stress="direct_stress"
    )
    return replace(potential, outputs=names, **changes)


def explicit_average(potential, members, quadrature):
    """Means over rotated copies of each structure, turned back; lists by structure."""
    results = []
    for system, one in enumerate(members):
        rotations, weights = quadrature.rotations, quadrature.weights
        if rotations.ndim == 4:
            rotations, weights = rotations[:, system], weights[:, system]
        sums = {}
        for rotation, weight in zip(rotations, weights, strict=True):
            p = potential(rotate(one, rotation))
            back = {
                "energy": p.energy,
                "forces": p.forces @ rotation,
                "direct_forces": p.direct_forces @ rotation,
                "stress": rotation.mT @ p.stress @ rotation,
                "direct_stress": rotation.mT @ p.direct_stress @ rotation,
            }
            for name, value in back.items():
                sums[name] = sums.get(name, 0.0) + weight * value
        results.append(sums)
    return results


QUADRATURES = {
    "octahedral": Quadrature(
        rotations=octahedral_rotations(),
        weights=torch.full((24,), 1 / 24, dtype=torch.float64),
        degree=3,
    ),
    "weighted": Quadrature(
        rotations=random_rotations(5),
        weights=torch.tensor([0.4, 0.3, 0.2, 0.15, -0.05], dtype=torch.float64),
        degree=0,
    ),
    "per system": Quadrature(
        rotations=random_rotations(4, 3, seed=1),
        weights=torch.tensor(
            [[0.1, 0.25, 1.0], [0.2, 0.25, 0.0], [0.3, 0.25, 0.0], [0.4, 0.25, 0.0]],
            dtype=torch.float64,
        ),
        degree=0,
    ),
}


@pytest.mark.parametrize("name", QUADRATURES)
def test_quadrature_is_the_average_over_rotated_structures(name):
    """Energy, forces, stress and both direct heads."""
    quadrature = QUADRATURES[name]
    members = [POOL["triclinic"], POOL["perovskite"], POOL["slab"]]
    potential = all_outputs(tiny_potential("converged"))
    batch = concatenate(members)
    result = replace(potential, quadrature=quadrature)(batch)
    expected = explicit_average(potential, members, quadrature)
    raw = potential(batch)
    assert float((raw.forces - result.forces).abs().max()) > 0.1
    for system, sums in enumerate(expected):
        own = properties_of(result, batch, system)
        for field, value in sums.items():
            both = getattr(own, field), value
            finite = both[1].isfinite()
            assert torch.equal(finite, both[0].isfinite())
            error = (both[0] - both[1])[finite].abs().sum()
            assert float(error) <= tolerances.AVERAGED, field


def test_averaged_forces_are_the_gradient_of_the_averaged_energy():
    potential = replace(tiny_potential("converged"), quadrature=QUADRATURES["octahedral"])
    members = [POOL["triclinic"], POOL["methane"]]
    directions = [unit_directions(one) for one in members]
    errors = force_errors(potential, members, directions, (1e-4, 1e-5))
    assert float(errors.amin(1).max()) <= tolerances.FORCE_DIFFERENCE


def test_the_hessian_of_an_average_is_the_average_of_hessians():
    quadrature, potential, one = QUADRATURES["weighted"], tiny_potential("converged"), triclinic()
    found = hessian(replace(potential, quadrature=quadrature), one)
    expected = torch.zeros_like(found)
    for rotation, weight in zip(quadrature.rotations, quadrature.weights, strict=True):
        turn = torch.block_diag(*[rotation] * 4)
        expected += weight * turn.mT @ hessian(potential, rotate(one, rotation)) @ turn
    assert float((found - expected).abs().max()) <= tolerances.AVERAGED
