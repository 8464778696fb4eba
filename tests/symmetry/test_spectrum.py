import math
from dataclasses import replace

import pytest
import torch
from factories import structures, tiny_potential
from lennard_jones import LennardJones

from coset.edge_model import Quadrature
from coset.errors import ConfigError
from coset.structures import Properties, concatenate, rotate, split
from coset.symmetry.crystal import find_group
from coset.symmetry.harmonics import generators, invariants, representation
from coset.symmetry.spectrum import anisotropy_spectrum, haar

ROTATIONS = haar(12, 1)


@pytest.mark.parametrize("degree", range(11))
@pytest.mark.parametrize("parity", [1, -1])
def test_representations_multiply_like_the_rotations(degree, parity):
    other = haar(12, 2)
    d, e = (representation(degree, parity, r) for r in (ROTATIONS, other))
    product = representation(degree, parity, ROTATIONS @ other)
    assert (d @ e - product).abs().max() < 1e-12
    assert (d @ d.mT - torch.eye(2 * degree + 1)).abs().max() < 1e-12
    assert (representation(degree, parity, -ROTATIONS) - parity * d).abs().max() < 1e-14


def test_half_turns_and_the_identity_have_no_special_case():
    axes = torch.eye(3, dtype=torch.float64)
    turns = torch.stack([2.0 * torch.outer(n, n) - axes for n in axes] + [axes])
    d = representation(4, 1, turns)
    assert (d[:3] @ d[:3] - torch.eye(9)).abs().max() < 1e-13
    assert (d[0] @ d[1] - d[2]).abs().max() < 1e-13
    assert (d[3] - torch.eye(9)).abs().max() == 0.0


def test_generators_are_the_derivatives():
    step = 1e-5
    for axis, n in enumerate(torch.eye(3, dtype=torch.float64)):
        cross = torch.linalg.cross(n.expand(3, 3), torch.eye(3, dtype=torch.float64)).mT
        small = torch.matrix_exp(torch.stack([step * cross, -step * cross]))
        d = representation(3, 1, small)
        assert ((d[0] - d[1]) / (2 * step) - generators(3)[axis]).abs().max() < 1e-9
    commutator = generators(5)[0] @ generators(5)[1] - generators(5)[1] @ generators(5)[0]
    assert (commutator - generators(5)[2]).abs().max() < 1e-12


def test_dimensions_of_the_invariants_of_a_cube():
    """Bethe's numbers: the cube leaves one column at l = 0, 4, 6, 8, 9-, 10, two at 12."""
    group = find_group(structures()["fcc"], 1e-2)
    operations = torch.from_numpy(group.cartesian_rotations)
    found = [invariants(degree, 1, operations).shape[1] for degree in range(13)]
    assert found == [1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 2]
    assert all(invariants(degree, -1, operations).shape[1] == 0 for degree in range(13))


class Anisotropic:
    """An invariant potential and one sector on top, with its exact torque."""

    cutoff, elements, level_of_theory = 6.0, frozenset(range(1, 119)), ""

    def __init__(self, reference, degree, parity, coefficients):
        self.reference, self.sector, self.coefficients = reference, (degree, parity), coefficients

    def check_supported(self, structures):
        """Everything is supported."""

    def __call__(self, batch):
        energies, torques = [], []
        for one in split(batch):
            turn = torch.linalg.lstsq(self.reference.cell[0], one.cell[0]).solution.mT
            d = representation(*self.sector, turn[None])[0]
            energies.append((self.coefficients * d).sum() - 3.0)
            slopes = generators(self.sector[0]) @ d
            torques.append((self.coefficients * slopes).sum((1, 2)))
        return Properties(energy=torch.stack(energies), torque=torch.stack(torques))


@pytest.mark.parametrize(("degree", "parity"), [(1, 1), (2, 1), (3, -1), (4, 1)])
def test_an_injected_sector_is_found_where_it_is(degree, parity):
    one = structures()["triclinic"]
    size = 2 * degree + 1
    c = torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    potential = Anisotropic(one, degree, parity, c)
    identity = torch.eye(3, dtype=torch.float64)[None]
    spectrum = anisotropy_spectrum(potential, one, identity, max_degree=4)
    power = {(s.degree, s.parity): s.power for s in spectrum.sectors}
    expected = float(c.square().sum()) / size
    assert abs(power.pop((degree, parity)) - expected) < 1e-10 * expected
    assert max(power.values()) < 1e-20
    assert abs(spectrum.mean + 3.0) < 1e-10
    assert spectrum.unexplained < 0.10


@pytest.mark.parametrize("name", ["fcc", "hcp", "diamond"])
def test_the_spectrum_predicts_what_a_rule_leaves(name):
    one = structures()[name]
    operations = torch.from_numpy(find_group(one, 1e-2).cartesian_rotations)
    potential = tiny_potential()
    spectrum = anisotropy_spectrum(potential, one, operations, max_degree=10)
    assert spectrum.unexplained < 0.1
    nodes = haar(3, 5)
    rule = Quadrature(rotations=nodes, weights=torch.full((3,), 1 / 3).double(), degree=0)
    errors = []
    for offset in haar(60, 6):
        copies = concatenate([rotate(one, offset @ node) for node in nodes])
        errors.append(float(potential(copies).energy.mean()) - spectrum.mean)
    found = math.sqrt(sum(e * e for e in errors) / len(errors))
    assert 0.6 < found / spectrum.residual(rule) < 1.6


def test_an_invariant_potential_has_no_spectrum():
    one = structures()["hcp"]
    spectrum = anisotropy_spectrum(LennardJones(), one, torch.eye(3).double()[None], max_degree=2)
    assert spectrum.rms < 1e-10 * abs(spectrum.mean)


def test_too_many_unknowns_are_refused():
    one = structures()["triclinic"]
    with pytest.raises(ConfigError, match="at most 2000"):
        anisotropy_spectrum(
            replace(tiny_potential()), one, torch.eye(3).double()[None], max_degree=12
        )
