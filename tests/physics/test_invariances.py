"""What must not matter: where, in which cell, in which batch, in which order."""

from dataclasses import fields, replace

import numpy as np
import pytest
import tolerances
import torch
from factories import (
    TYPES,
    VARIANTS,
    all_structures,
    crystal,
    molecule,
    rattled,
    structures,
    tiny_potential,
    triclinic,
)
from tolerances import close

from coset.edge_model import (
    IDENTITY,
    INDEXING,
    Geometry,
    Outputs,
    averaged_network,
    edge_energy,
    edge_gradient,
)
from coset.neighbors import edge_vectors, neighbor_list
from coset.pet.attention import _FirstOrderAttention, attend, token_classes
from coset.structures import (
    Structures,
    concatenate,
    make_structure,
    properties_of,
    repeat,
    select,
    split,
    strain,
)

POOL = structures()


def with_all_heads(variant="converged", **changes):
    names = {"direct_forces": "direct_forces", "direct_stress": "direct_stress"}
    return replace(tiny_potential(variant), outputs=Outputs(**names), **changes)


def assert_same(result, expected, tolerance=tolerances.SAME_PHYSICS, skip=()):
    """Every property agrees; what is undefined is undefined in both."""
    for field in fields(expected):
        a, b = getattr(result, field.name), getattr(expected, field.name)
        if field.name in skip or (a is None and b is None):
            continue
        assert torch.equal(a.isnan(), b.isnan()), field.name
        assert close(a.nan_to_num(), b.nan_to_num(), tolerance), field.name


# Where the atoms are


@pytest.mark.parametrize("variant", ["converged", "grid", "residual"])
def test_translation(variant):
    """Of every structure by its own vector; conservative forces sum to zero."""
    batch, potential = all_structures(), with_all_heads(variant)
    shifts = 7.0 * torch.tensor(np.random.default_rng(0).normal(size=(len(batch), 3)))
    moved = replace(batch, positions=batch.positions + shifts[batch.system_index])
    expected = potential(batch)
    assert_same(potential(moved), expected)
    sums = torch.zeros(len(batch), 3, dtype=torch.float64)
    sums = sums.index_add(0, batch.system_index, expected.forces)
    assert float(sums.abs().max()) <= tolerances.SAME_PHYSICS


@pytest.mark.parametrize("seed", range(3))
def test_periodic_images(seed):
    """Every atom moved by up to 50 lattice vectors of its own."""
    batch, potential = all_structures(), with_all_heads()
    rng = np.random.default_rng(seed)
    numbers = torch.tensor(rng.integers(-50, 51, (len(batch.positions), 3))).double()
    numbers = numbers * batch.pbc[batch.system_index]
    shifts = torch.einsum("ai,aij->aj", numbers, batch.cell[batch.system_index])
    moved = replace(batch, positions=batch.positions + shifts)
    assert_same(potential(moved), potential(batch))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["twelve", "thirty-two", "ring"])
def test_permutation(name, seed):
    one, potential = POOL[name], with_all_heads()
    order = torch.tensor(np.random.default_rng(seed).permutation(len(one.positions)))
    changed = replace(one, positions=one.positions[order], atomic_numbers=one.atomic_numbers[order])
    expected, result = potential(one), potential(changed)
    per_atom = {
        name: getattr(expected, name)[order]
        for name in ("forces", "atomic_energies", "direct_forces")
    }
    assert_same(result, replace(expected, **per_atom), tolerances.SAME_PHYSICS)


# Which cell


@pytest.mark.parametrize("repeats", [(2, 1, 1), (3, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("name", ["triclinic", "perovskite", "fcc"])
def test_supercells(name, repeats):
    """Energy per atom, forces of every image, stress; raw energies, without the baseline."""
    one, potential = POOL[name], with_all_heads()
    small, large = potential(one), potential(repeat(one, repeats))
    n_images = int(np.prod(repeats))
    for field in ("forces", "atomic_energies", "direct_forces"):
        images = getattr(large, field).reshape(n_images, *getattr(small, field).shape)
        assert close(images, getattr(small, field).expand_as(images), tolerances.SAME_PHYSICS)
    assert abs(float(large.energy / n_images - small.energy)) <= tolerances.SAME_PHYSICS
    assert close(large.stress, small.stress, tolerances.SAME_PHYSICS)
    assert close(large.direct_stress, small.direct_stress, tolerances.SAME_PHYSICS)
    assert close(large.torque / n_images, small.torque, tolerances.SAME_PHYSICS)


def test_twenty_seven_copies_are_one_and_ghosts_do_nothing():
    """3×3×3 of a rattled crystal, and a molecule beside twenty atoms 40 Å away."""
    one, potential = POOL["left-handed"], tiny_potential("converged")
    large = repeat(one, (3, 3, 3))
    assert abs(float(potential(large).energy / 27 - potential(one).energy)) <= 1e-10
    water = POOL["water"]
    ghosts = torch.tensor(np.random.default_rng(0).normal(size=(20, 3)))
    ghosts = 40.0 * torch.arange(1, 21)[:, None] + ghosts
    both = make_structure(
        torch.cat([water.positions, ghosts]),
        torch.cat([water.atomic_numbers, torch.full((20,), 29)]),
    )
    alone, together = potential(water), potential(both)
    assert close(together.forces[:3], alone.forces, tolerances.SAME_PHYSICS)
    assert not together.forces[3:].any()
    atom = potential(POOL["atom"])
    assert close(together.energy, alone.energy + 20 * atom.energy, tolerances.SAME_PHYSICS)


UNIMODULAR = (
    ((1, 1, 0), (0, 1, 0), (0, 0, 1)),
    ((1, 0, 2), (-1, 1, 0), (0, 0, 1)),
    ((0, 1, 0), (1, 0, 0), (0, 0, 1)),
    ((2, 1, -1), (1, 1, 0), (-3, 0, 4)),
)


@pytest.mark.parametrize("matrix", UNIMODULAR)
@pytest.mark.parametrize("name", ["triclinic", "perovskite", "bcc"])
def test_cell_choice(name, matrix):
    """Another basis of the same lattice, in the same frame, of either handedness."""
    one, potential = POOL[name], with_all_heads()
    change = torch.tensor(matrix, dtype=torch.float64)
    assert abs(abs(float(torch.linalg.det(change))) - 1) < 1e-12
    other = replace(one, cell=change @ one.cell)
    assert_same(potential(other), potential(one))


@pytest.mark.parametrize("name", ["slab", "chain", "water", "atom"])
def test_the_size_of_an_open_box_does_not_matter(name):
    one, potential = POOL[name], with_all_heads()
    filled = torch.where(one.pbc[:, :, None], one.cell, 17.0 * torch.eye(3).double())
    assert_same(potential(replace(one, cell=filled)), potential(one))


def test_an_open_system_is_a_periodic_one_with_enough_vacuum():
    one, potential = POOL["methane"], tiny_potential("converged")
    boxed = replace(
        one, cell=20.0 * torch.eye(3).double()[None], pbc=torch.ones(1, 3, dtype=torch.bool)
    )
    assert_same(potential(boxed), potential(one), skip=("stress",))


# In which company


def assert_alone_as_in_a_batch(names, potential, alone):
    batch = concatenate([POOL[name] for name in names])
    result = potential(batch)
    for system, name in enumerate(names):
        assert_same(properties_of(result, batch, system), alone[name])


@pytest.mark.parametrize("variant", ["converged", "grid", "solver10"])
def test_batch_composition(variant):
    """Twenty random batches of one to twelve structures against each structure alone."""
    compare_batches(variant, 20)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_hundred_batch_compositions(variant):
    compare_batches(variant, 200)


def compare_batches(variant, count):
    potential = with_all_heads(variant)
    alone = {name: potential(one) for name, one in POOL.items()}
    rng = np.random.default_rng(11)
    for _ in range(count):
        names = rng.choice(list(POOL), rng.integers(1, 13)).tolist()
        assert_alone_as_in_a_batch(names, potential, alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_crosses_between_structures(variant):
    """d(energy of one)/d(edges of the others) is exactly zero, not small."""
    batch = concatenate([POOL[name] for name in ("triclinic", "water", "hcp", "slab")])
    potential = tiny_potential(variant)
    graph = neighbor_list(batch, potential.cutoff)
    r = edge_vectors(batch, graph).requires_grad_()
    geometry = potential.model.geometry(r, graph, INDEXING)
    readout = averaged_network(
        potential.model, r[geometry.kept], geometry, INDEXING, potential.outputs, IDENTITY
    )
    system = batch.system_index[graph.centers]
    for chosen in range(4):
        energy = readout.atomic_energies[batch.system_index == chosen].sum()
        (gradient,) = torch.autograd.grad(energy, r, retain_graph=True)
        assert not gradient[system != chosen].any()
        assert gradient[system == chosen].any()


def test_charges_stay_with_their_system():
    """A conditioned model: the same structure neutral and charged in one batch."""
    potential, one = with_all_heads("conditioned"), triclinic()
    ion = replace(one, charge=one.charge + 2, spin_multiplicity=one.spin_multiplicity + 2)
    batch = concatenate([one, ion, one])
    result = potential(batch)
    for system, member in enumerate((one, ion, one)):
        assert_same(properties_of(result, batch, system), potential(member))
    assert abs(float(result.energy[1] - result.energy[0])) > 1e-3


# Few or no edges


@pytest.mark.parametrize("variant", VARIANTS)
def test_isolated_atoms(variant):
    """The same energy in any cell and company, forces exactly zero; nothing but its own species."""
    potential = with_all_heads(variant)
    for number in TYPES:
        free = potential(molecule([(0.1, 0.2, 0.3)], [number]))
        boxed = potential(crystal(np.diag([13.0, 17.0, 19.0]), [(0.5, 0.1, 0.9)], [number]))
        slab = make_structure(
            torch.zeros(1, 3).double(),
            torch.tensor([number]),
            cell=torch.diag(torch.tensor([12.0, 12.0, 0.0]).double()),
            pbc=(True, True, False),
        )
        for other in (boxed, potential(slab)):
            assert close(other.energy, free.energy, tolerances.SAME_ALGEBRA)
        assert not free.forces.any()
        assert not boxed.forces.any()
        assert not boxed.stress.any()
        assert not free.direct_forces.any()


def test_the_energy_of_an_isolated_atom_is_baseline_and_node_readout():
    """With the node heads switched off nothing but the baseline is left."""
    potential = tiny_potential("converged")
    with torch.no_grad():
        for name, weight in potential.model.named_parameters():
            if name.startswith("node_last_layers.energy"):
                weight.zero_()
    for number in TYPES:
        energy = potential(molecule([(0, 0, 0)], [number])).energy
        assert float(energy) == pytest.approx(-1.0 - 0.1 * number, abs=1e-12)


def test_two_atoms_apart_are_two_atoms():
    """Beyond the cutoff, and just inside it, where the weights have faded out."""
    potential = tiny_potential("converged")
    distances = (4.99, 5.0 - 1e-9, 5.0 + 1e-9, 5.1, 12.0)
    dimers = concatenate([molecule([(0, 0, 0), (d, 0, 0)], [29, 8]) for d in distances])
    atoms = potential(concatenate([molecule([(0, 0, 0)], [z]) for z in (29, 8)])).energy.sum()
    result = potential(dimers)
    assert close(result.energy, atoms.expand(5), tolerances.SAME_ALGEBRA)
    assert not result.forces[4:].any()
    near = potential(molecule([(0, 0, 0), (4.0, 0, 0)], [29, 8])).energy
    assert abs(float(near - atoms)) > 1e-3


# Smoothness at the cutoff


def three_atoms(distances):
    """A dimer, and a third atom at each distance from its first along one direction."""
    n = len(distances)
    third = distances[:, None, None] * DIRECTION
    return Structures(
        positions=torch.cat([DIMER.expand(n, 2, 3), third], dim=1).reshape(-1, 3),
        atomic_numbers=torch.tensor([29, 8, 6]).repeat(n),
        cell=torch.zeros(n, 3, 3, dtype=torch.float64),
        pbc=torch.zeros(n, 3, dtype=torch.bool),
        system_index=torch.arange(n).repeat_interleave(3),
        charge=torch.zeros(n, dtype=torch.int64),
        spin_multiplicity=torch.ones(n, dtype=torch.int64),
    )


DIMER = torch.tensor([(0.0, 0.0, 0.0), (-0.4, 1.1, -1.2)], dtype=torch.float64)
DIRECTION = torch.tensor([0.36, 0.48, 0.8], dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_atom_leaves_smoothly(variant):
    """From two widths inside the cutoff to 0.1 Å outside, the energy does what the forces say."""
    potential = tiny_potential(variant)
    radius = potential.model.hypers.cutoff.cutoff
    distances = torch.arange(radius - 1.0, radius + 0.1, 2e-3, dtype=torch.float64)
    result = potential(three_atoms(distances))
    force = result.forces.reshape(-1, 3, 3)
    slope = -(force[:, 2] @ DIRECTION)
    # Trapezoids of 2e-3 Å are wrong by 1e-9 Å³ times the third derivative; a jump of the energy
    # counts in full, one of the force times 1e-3 Å.
    trapezoids = 0.5 * (slope[1:] + slope[:-1]) * distances.diff()
    assert float((result.energy.diff() - trapezoids).abs().max()) <= 2e-4
    assert not force[distances > radius, 2].any()
    assert float(slope.abs().max()) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_jump_where_an_edge_is_dropped(variant):
    """1e-8 Å on both sides of the place, found by bisection: 1e-9 eV, 1e-5 eV/Å."""
    potential, one = tiny_potential(variant), POOL["twelve"]
    graph = neighbor_list(one, potential.cutoff)
    r = edge_vectors(one, graph)
    geometry = potential.model.geometry(r, graph, INDEXING)
    lengths = torch.linalg.norm(r, dim=1)
    rows = geometry.kept[graph.centers[geometry.kept] != graph.neighbors[geometry.kept]]
    rows = rows[torch.argsort(lengths[rows], descending=True)][::2][:4]
    members, moves = [], []
    for row in rows.tolist():
        atom, unit = int(graph.neighbors[row]), r[row] / lengths[row]
        place = crossing(potential, one, graph, row)
        for side in (-1e-8, 1e-8):
            moved = one.positions.clone()
            moved[atom] += (place + side) * unit
            members.append(replace(one, positions=moved))
        moves.append((atom, unit))
    result = potential(concatenate(members))
    energy = result.energy.reshape(-1, 2)
    force = result.forces.reshape(len(moves), 2, -1, 3)
    for (atom, unit), (before, after), sides in zip(moves, energy, force, strict=True):
        expected = -2e-8 * float(sides[0, atom] @ unit)
        assert abs(float(after - before) - expected) <= 1e-9
        assert float((sides[1] - sides[0]).abs().max()) <= 1e-5
    counts = [n_kept(potential, member) for member in members]
    assert all(a > b for a, b in zip(counts[::2], counts[1::2], strict=True))


def n_kept(potential, one):
    graph = neighbor_list(one, potential.cutoff)
    return len(potential.model.geometry(edge_vectors(one, graph), graph, INDEXING).kept)


def crossing(potential, one, graph, row):
    """How far the neighbor must move along its edge until the edge is dropped."""
    r = edge_vectors(one, graph)[row]
    atom, unit = int(graph.neighbors[row]), r / torch.linalg.norm(r)
    low, high = 0.0, 5.0
    for _ in range(36):
        middle = 0.5 * (low + high)
        moved = one.positions.clone()
        moved[atom] += middle * unit
        vectors = edge_vectors(replace(one, positions=moved), graph)
        inside = bool((potential.model.geometry(vectors, graph, INDEXING).kept == row).any())
        low, high = (middle, high) if inside else (low, middle)
    return 0.5 * (low + high)


# How it is called


def test_an_energy_is_the_same_without_forces():
    potential, batch = with_all_heads(), all_structures()
    full, plain = potential(batch), replace(potential, forces=False)(batch)
    assert plain.forces is None
    assert plain.stress is None
    assert plain.torque is None
    for name in ("energy", "atomic_energies", "direct_forces", "direct_stress"):
        a, b = getattr(full, name).nan_to_num(), getattr(plain, name).nan_to_num()
        assert close(a, b, tolerances.SAME_ALGEBRA), name


def test_energies_of_atoms_sum_to_the_energy():
    batch = all_structures()
    result = tiny_potential("converged")(batch)
    sums = torch.zeros(len(batch)).double().index_add(0, batch.system_index, result.atomic_energies)
    assert close(sums, result.energy, tolerances.SAME_ALGEBRA)


def test_inputs_are_not_changed_and_outputs_carry_no_graph():
    potential, batch = with_all_heads(), all_structures()
    batch.positions.requires_grad_()
    before = {f.name: getattr(batch, f.name).detach().clone() for f in fields(batch)}
    result = potential(batch)
    for name, value in before.items():
        assert torch.equal(getattr(batch, name).detach(), value), name
    assert batch.positions.grad is None
    for field in fields(result):
        value = getattr(result, field.name)
        assert value is not None
        assert not value.requires_grad, field.name
    assert all(p.grad is None for p in potential.model.parameters())


def test_calls_do_not_depend_on_the_grad_mode():
    potential, batch = tiny_potential("converged"), concatenate(split(all_structures())[:12])
    with torch.no_grad():
        quiet = potential(batch)
    assert_same(quiet, potential(batch), 0.0)


def test_the_same_call_twice_is_the_same_to_the_bit():
    potential, batch = with_all_heads(), all_structures()
    assert_same(potential(batch), potential(batch), 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_edge_gradient_with_and_without_a_graph(variant):
    """Explicit attention gives the same readout and gradient as the first-order one."""
    batch = concatenate([POOL[name] for name in ("triclinic", "water", "six", "atom")])
    potential = with_all_heads(variant)
    graph = neighbor_list(batch, potential.cutoff)
    r = edge_vectors(batch, graph)
    call = {"outputs": potential.outputs}
    first, g1 = edge_gradient(potential.model, graph, r, **call)
    again, g2 = edge_gradient(potential.model, graph, r, create_graph=True, **call)
    energy = edge_energy(potential.model, graph, r, **call)
    assert close(g1, g2.detach(), tolerances.SAME_ALGEBRA)
    assert not g1.requires_grad
    assert g2.requires_grad
    for name in ("atomic_energies", "direct_forces", "direct_stress"):
        value = getattr(first, name)
        assert close(value, getattr(again, name).detach(), tolerances.SAME_ALGEBRA), name
        assert close(value, getattr(energy, name), tolerances.SAME_ALGEBRA), name
        assert not value.requires_grad
    assert not r.requires_grad


# Attention

TOKENS = (1, 2, 15, 16, 17, 64, 65)


def attention_case(n_rotations=2, d=8, seed=0):
    """Atoms with every number of tokens, biases from 0 down to the floor."""
    counts = torch.tensor([t - 1 for t in TOKENS])
    centers = torch.repeat_interleave(counts)
    rows, sizes, place = token_classes(centers, len(counts))
    n_tokens = len(counts) + len(centers)
    rng = np.random.default_rng(seed)
    qkv = torch.tensor(rng.normal(size=(n_rotations, n_tokens, 3 * d)) * 1.5)
    bias = torch.tensor(np.log(np.maximum(rng.uniform(size=n_tokens) ** 4, 1e-15)))
    bias[: len(counts)] = 0.0
    empty = torch.zeros(0, dtype=torch.int64)
    geometry = Geometry(
        kept=empty,
        graph=neighbor_list(POOL["atom"], 1.0),
        weights=torch.zeros(0, dtype=torch.float64),
        tokens=rows,
        counts=sizes,
        place=place,
    )
    members = [
        [atom, *(len(counts) + torch.nonzero(centers == atom)[:, 0]).tolist()]
        for atom in range(len(counts))
    ]
    return qkv, bias, geometry, members


def one_by_one(qkv, bias, members, n_heads, scale):
    """Attention of every atom by itself, without padding, in numpy."""
    n_rotations, n_tokens, width = qkv.shape
    q, k, v = np.split(qkv.numpy(), 3, axis=-1)
    d = width // 3 // n_heads
    out = np.zeros((n_rotations, n_tokens, width // 3))
    for rotation in range(n_rotations):
        for rows in members:
            for head in range(n_heads):
                part = slice(head * d, (head + 1) * d)
                logits = scale * q[rotation, rows, part] @ k[rotation, rows, part].T
                logits += bias.numpy()[rows]
                weights = np.exp(logits - logits.max(1, keepdims=True))
                weights /= weights.sum(1, keepdims=True)
                out[rotation, rows, part] = weights @ v[rotation, rows, part]
    return torch.tensor(out)


def first_order(qkv, bias, geometry, n_heads, scale):
    """What `Attention` calls when no second derivative is asked for."""
    return _FirstOrderAttention.apply(qkv, bias, geometry, n_heads, scale)


def test_both_attentions_are_a_softmax_over_the_tokens_of_an_atom():
    qkv, bias, geometry, members = attention_case()
    expected = one_by_one(qkv, bias, members, 2, 0.4)
    explicit = attend(qkv, bias, geometry, 2, 0.4)
    assert close(explicit, expected, tolerances.SAME_ALGEBRA)
    assert close(first_order(qkv, bias, geometry, 2, 0.4), expected, tolerances.SAME_ALGEBRA)


def test_both_attentions_have_the_same_gradients():
    """To tokens and biases, for every number of tokens, summed over rotations for the biases."""
    qkv, bias, geometry, members = attention_case(n_rotations=3, seed=1)
    qkv.requires_grad_()
    bias.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(3, qkv.shape[1], 8, generator=generator, dtype=torch.float64)
    pairs = [
        torch.autograd.grad((function(qkv, bias, geometry, 2, 0.4) * seed).sum(), (qkv, bias))
        for function in (attend, first_order)
    ]
    for explicit, analytic in zip(*pairs, strict=True):
        assert close(explicit, analytic, tolerances.SAME_ALGEBRA)
    by_bias = pairs[0][1]
    for atom, rows in enumerate(members[1:], 1):
        assert by_bias[rows].any(), TOKENS[atom]


def test_first_order_attention_refuses_a_second_derivative():
    """Rather than giving a wrong one."""
    qkv, bias, geometry, _ = attention_case()
    qkv.requires_grad_()
    out = first_order(qkv, bias, geometry, 2, 0.4)
    (gradient,) = torch.autograd.grad(out.sum() + (out**2).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), qkv)


@pytest.mark.parametrize("factor", [1.0, 10.0, 50.0])
def test_padding_does_not_leak(factor):
    """Logits up to hundreds: no key in the padding gets a weight, however wide the class is."""
    qkv, bias, geometry, members = attention_case(seed=2)
    strong = qkv * factor**0.5
    expected = one_by_one(strong, bias, members, 2, 0.4)
    assert close(attend(strong, bias, geometry, 2, 0.4), expected, 1e-11)


def test_token_classes_hold_every_token_once():
    counts = torch.tensor([0, 3, 15, 16, 40, 1, 0])
    rows, sizes, place = token_classes(torch.repeat_interleave(counts), len(counts))
    flat = torch.cat([part.reshape(-1) for part in rows])
    assert torch.equal(flat[place], torch.arange(len(counts) + int(counts.sum())))
    assert sorted(torch.cat(sizes).tolist()) == sorted((counts + 1).tolist())


# Strained copies of what exists must not be confused with each other


def test_systems_of_a_batch_have_their_own_cell():
    one, potential = triclinic(), tiny_potential("converged")
    strains = 0.02 * torch.tensor(np.random.default_rng(1).normal(size=(4, 3, 3)))
    batch = strain(concatenate([one] * 4), strains)
    result = potential(batch)
    for system in range(4):
        alone = potential(select(batch, torch.tensor([system])))
        assert_same(properties_of(result, batch, system), alone)
    assert float(result.energy.std()) > 1e-3
    assert float(potential(rattled(one, 0.1)).energy - potential(one).energy) != 0.0
