"""Exact second derivatives against differences of forces, and D(q) against supercells."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import VARIANTS, crystal, structures, tiny_potential
from tolerances import FOLDED_HESSIAN, HESSIAN_DIFFERENCE, close

from coset.derivatives import dynamical_matrices, hessian
from coset.edge_model import Quadrature
from coset.errors import ConfigError
from coset.pet import cutoff
from coset.structures import concatenate, repeat, rotate
from coset.symmetry.spectrum import haar

CRYSTALS = ("triclinic", "rocksalt", "hcp", "fcc", "unwrapped")
SMOOTH = [name for name in VARIANTS if name not in ("solver10", "metatrain", "conditioned")]


GENERAL = torch.tensor([1.0 / 3.0, 1.0 / 4.0, 1.0 / 2.0], dtype=torch.float64)
"""A wave vector of the mesh 3x4x2, on no mirror plane of a lattice of these."""


def phases(cells, q):
    """exp(2 pi i q.S) of every cell."""
    angle = 2.0 * torch.pi * cells @ q
    return torch.polar(torch.ones_like(angle), angle)


def by_differences(potential, one, atom, axis, h=1e-4):
    """Fourth order in h."""
    forces = []
    for step in (-2.0, -1.0, 1.0, 2.0):
        positions = one.positions.clone()
        positions[atom, axis] += step * h
        forces.append(potential(replace(one, positions=positions)).forces)
    return -(forces[0] - 8 * forces[1] + 8 * forces[2] - forces[3]) / (12 * h)


@pytest.mark.parametrize("variant", SMOOTH)
def test_columns_are_derivatives_of_forces(variant):
    potential = tiny_potential(variant)
    for name in ("triclinic", "slab", "water"):
        one = structures()[name]
        exact = hessian(potential, one)
        for atom, axis in ((0, 0), (1, 2), (2, 1)):
            close(exact[:, :, atom, axis], by_differences(potential, one, atom, axis),
                  HESSIAN_DIFFERENCE)  # fmt: skip


@pytest.mark.parametrize("name", ["triclinic", "slab", "methane", "rocksalt"])
def test_hessians_are_symmetric_and_leave_translations_alone(name):
    exact = hessian(tiny_potential(), structures()[name])
    matrix = exact.flatten(0, 1).flatten(1, 2)
    scale = float(matrix.abs().max())
    assert float((matrix - matrix.mT).abs().max()) < 1e-13 * scale
    assert float(exact.sum(2).abs().max()) < 1e-13 * scale


def test_the_hessian_of_an_average_is_the_average_of_hessians():
    potential, one = tiny_potential(), structures()["triclinic"]
    nodes, weights = haar(3, 4), torch.tensor([0.2, 0.5, 0.3]).double()
    rule = Quadrature(rotations=nodes, weights=weights, degree=0)
    mean = torch.zeros(len(one.atomic_numbers), 3, len(one.atomic_numbers), 3).double()
    for node, weight in zip(nodes, weights, strict=True):
        turned = hessian(potential, rotate(one, node))
        mean += weight * torch.einsum("ca,icjd,db->iajb", node, turned, node)
    close(hessian(potential, one, rule), mean, FOLDED_HESSIAN)


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "converged") for name in CRYSTALS), ("triclinic", "zbl"), ("rocksalt", "layernorm")],
)
def test_dynamical_matrices_are_folded_hessians_of_supercells(name, variant):
    potential, one, repeats = tiny_potential(variant), structures()[name], (3, 4, 2)
    n = len(one.atomic_numbers)
    cells = torch.cartesian_prod(*(torch.arange(k) for k in repeats)).double()
    large = hessian(potential, repeat(one, repeats)).reshape(len(cells), n, 3, len(cells), n, 3)
    q = torch.stack([GENERAL, GENERAL * torch.tensor([2.0, 0.0, 1.0]), torch.zeros(3).double()])
    found = dynamical_matrices(potential, one, q)
    for point, matrix in zip(q, found, strict=True):
        phase = phases(cells, point)
        folded = torch.einsum("jasib,s->jaib", large[0].to(phase.dtype), phase)
        folded = folded.reshape(3 * n, 3 * n)
        scale = max(float(folded.abs().max()), 1.0)
        assert float((matrix - folded).abs().max()) < FOLDED_HESSIAN * scale
        assert float((matrix - matrix.mH).abs().max()) < 1e-12 * scale


def folded_differences(potential, one, repeats, q):
    """D(q), transposed, from forces on a supercell: fourth-order differences, h = 1e-4 Å."""
    n = len(one.atomic_numbers)
    cells = torch.cartesian_prod(*(torch.arange(k) for k in repeats)).double()
    phase = phases(cells, q)
    large = repeat(one, repeats)
    rows = []
    for atom in range(n):
        for axis in range(3):
            column = by_differences(potential, large, atom, axis)
            column = column.reshape(len(cells), n, 3).to(phase.dtype)
            rows.append(torch.einsum("sib,s->ib", column, phase).reshape(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CRYSTALS)
def test_dynamical_matrices_are_differences_of_forces_at_a_general_wave_vector(name):
    potential, one = tiny_potential("converged"), structures()[name]
    expected = folded_differences(potential, one, (3, 4, 2), GENERAL)
    (found,) = dynamical_matrices(potential, one, GENERAL[None])
    assert float((found - expected).abs().max()) < 1e-8


def test_one_step_of_the_cutoff_is_not_enough(monkeypatch):
    """Right forces and wrong second derivatives: the adaptive radii as one step would have them."""
    whole = cutoff._ImplicitRoot.backward

    class Constants:
        def __init__(self, ctx):
            self.hypers = ctx.hypers
            self.saved_tensors = tuple(one.detach() for one in ctx.saved_tensors)

    potential, one = tiny_potential("converged"), structures()["triclinic"]
    forces = potential(one).forces
    (right,) = dynamical_matrices(potential, one, GENERAL[None])
    monkeypatch.setattr(
        cutoff._ImplicitRoot,
        "backward",
        staticmethod(lambda ctx, grad: whole(Constants(ctx), grad)),
    )
    assert torch.equal(potential(one).forces, forces)
    (wrong,) = dynamical_matrices(potential, one, GENERAL[None])
    assert float((wrong - right).abs().max()) > 1e-4


def test_q_and_minus_q_are_conjugate_and_reciprocal_lattice_vectors_do_nothing():
    potential, one = tiny_potential(), structures()["hcp"]
    q = torch.tensor([[0.13, 0.27, 0.41]]).double()
    plus, minus, beyond = dynamical_matrices(potential, one, torch.cat([q, -q, q + 1.0]))
    close(plus, minus.conj(), FOLDED_HESSIAN)
    close(plus, beyond, FOLDED_HESSIAN)


@pytest.mark.parametrize("name", ["triclinic", "hcp"])
def test_real_columns_at_half_integer_wave_vectors(name):
    """The limit of complex columns from nearby, at the rate of a first derivative in q."""
    potential, one = tiny_potential(), structures()[name]
    q = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.5], [0.0, 0.5, -1.0]]).double()
    mixed = torch.cat([q[:2], q[:2] + 0.1, q[2:]])
    found = dynamical_matrices(potential, one, mixed)[[0, 1, 4]]
    assert float(found.imag.abs().max()) == 0.0
    near = dynamical_matrices(potential, one, q + 1e-9)
    close(found, near, 1e-6)


def test_atoms_out_of_reach_have_no_dynamics():
    far = crystal(40.0 * np.eye(3), [(0, 0, 0), (0.5, 0.5, 0.5)], [6, 6])
    q = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.5, 0.0]]).double()
    assert float(dynamical_matrices(tiny_potential(), far, q).abs().max()) == 0.0
    assert float(hessian(tiny_potential(), far).abs().max()) == 0.0


def test_masses_divide_by_the_root_of_their_product():
    potential, one = tiny_potential(), structures()["rocksalt"]
    q, masses = torch.tensor([[0.1, 0.2, 0.3]]).double(), torch.tensor([16.0, 63.5]).double()
    plain, weighted = (dynamical_matrices(potential, one, q, m)[0] for m in (None, masses))
    root = masses.sqrt().repeat_interleave(3)
    close(plain / root[:, None] / root, weighted, 1e-12)


def test_one_system_at_a_time():
    batch = concatenate([structures()["fcc"], structures()["hcp"]])
    with pytest.raises(ConfigError, match="2 systems"):
        hessian(tiny_potential(), batch)
