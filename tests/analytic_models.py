"""Analytic potentials as edge models: exact derivatives, strains and averages run on them."""

from dataclasses import dataclass

import numpy as np
import torch
from factories import FCC, HEXAGONAL, crystal

from coset.edge_model import Geometry, Readout
from coset.potential import ModelPotential
from coset.structures import Structures


class _Analytic:
    """Energies from edge vectors; every edge within the cutoff counts, with weight 1."""

    def geometry(self, edge_vectors, graph, exchange):
        kept = torch.arange(len(edge_vectors))
        return Geometry(
            kept=kept,
            graph=graph,
            weights=1.0 + 0.0 * edge_vectors.sum(1),
            tokens=(),
            counts=(),
            place=kept,
        )

    def network(self, edge_vectors, geometry, exchange, outputs, *, create_graph):
        centers = geometry.graph.centers
        energies = edge_vectors.new_zeros(len(edge_vectors), len(geometry.graph.atomic_numbers))
        energies = energies.index_add(1, centers, self.pairs(edge_vectors))
        return Readout(atomic_energies=self.triplets(energies, edge_vectors, centers))

    def triplets(self, energies, edge_vectors, centers):
        return energies

    def memory_per_batch(self, n_atoms, n_edges):
        return 1e4 * n_edges


@dataclass
class LennardJonesEdges(_Analytic):
    """Half of 4 e [(s/r)^12 - (s/r)^6] for every edge, cut off without a shift."""

    epsilon: float = 1.0
    sigma: float = 1.0

    def pairs(self, r):
        s6 = (self.sigma**2 / (r**2).sum(-1)) ** 3
        return 2.0 * self.epsilon * (s6 * s6 - s6)


@dataclass
class SpringEdges(_Analytic):
    """Half of k (r - length)²/2 for every edge."""

    stiffness: float
    length: float

    def pairs(self, r):
        return 0.25 * self.stiffness * ((r**2).sum(-1).sqrt() - self.length) ** 2


@dataclass
class StillingerWeber(_Analytic):
    """F. H. Stillinger, T. A. Weber, Phys. Rev. B 31, 5262 (1985), equations 2.3-2.6 and 3.4.

    turning: an energy of every bond that depends on its direction in space, for a potential that is
    not invariant under rotations. cosine: of the favored angle, negative. reach: in units of
    sigma, 1.8 for nearest neighbors alone.
    """

    turning: float = 0.0
    cosine: float = 1 / 3
    reach: float = 1.8
    epsilon, sigma = 2.1682, 2.0951
    big_a, big_b, stiffness, decay = 7.049556277, 0.6022245584, 21.0, 1.2

    def pairs(self, r):
        d = (r**2).sum(-1).sqrt() / self.sigma
        pair = self.big_a * (self.big_b * d**-4 - 1.0) * torch.exp(1.0 / (d - self.reach))
        slant = 1.0 + self.turning * (r[..., 0] ** 4 + r[..., 1] ** 3 * r[..., 2]) / self.sigma**4
        return 0.5 * self.epsilon * pair * slant

    def triplets(self, energies, r, centers):
        same = (centers[:, None] == centers).triu(1)
        first, second = torch.nonzero(same).unbind(1)
        d = (r**2).sum(-1).sqrt() / self.sigma
        a, b = r[:, first] / self.sigma, r[:, second] / self.sigma
        cosine = (a * b).sum(-1) / (d[:, first] * d[:, second])
        damping = torch.exp(self.decay / (d - self.reach))
        third = (
            self.stiffness * damping[:, first] * damping[:, second] * (cosine + self.cosine) ** 2
        )
        return energies.index_add(1, centers[first], self.epsilon * third)


def silicon() -> Structures:
    """Diamond."""
    return crystal(5.44 * np.array(FCC), ((0, 0, 0), (0.25, 0.25, 0.25)), [14] * 2)


def lonsdaleite() -> Structures:
    """Hexagonal diamond, with one free coordinate."""
    sites = ((1, 2, 0.0625), (2, 1, -0.0625), (2, 1, 0.5625), (1, 2, 0.4375))
    return crystal(3.84 * np.array(HEXAGONAL), [(x / 3, y / 3, z) for x, y, z in sites], [14] * 4)


def stillinger_weber(**changes: float) -> ModelPotential:
    """Silicon, or something like it."""
    model = StillingerWeber(**changes)
    return _potential(model, model.sigma * model.reach * (1.0 - 1e-9))


def lennard_jones_edges(cutoff: float, sigma: float = 1.0) -> ModelPotential:
    """With epsilon = 1, truncated at `cutoff`."""
    return _potential(LennardJonesEdges(sigma=sigma), cutoff)


def spring_edges(stiffness: float, length: float) -> ModelPotential:
    """Between nearest neighbors."""
    return _potential(SpringEdges(stiffness=stiffness, length=length), 1.16 * length)


def _potential(model, cutoff):
    elements = frozenset(range(1, 119))
    return ModelPotential(
        model=model, cutoff=cutoff, elements=elements, baseline=torch.zeros(119).double()
    )
