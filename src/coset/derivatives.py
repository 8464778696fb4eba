"""Second derivatives of the energy: exact Hessian columns, and dynamical matrices at any q.

One graph of g = dE/dr_e serves all columns. A displacement v of atoms changes edge vectors by
v_e = v_neighbor - v_center, so

    (H v)_i = sum_(neighbor i) G_e - sum_(center i) G_e,    G_e = d(sum_e g_e . v_e)/dr_e.

For v_j e^(2 pi i q.S) on the atoms of cell S, every quantity of cell S responds with the factor
e^(2 pi i q.S) times that of cell 0. Inside one atom's environment real Jacobians act; cells meet
only in the `Exchange`, and there the factors appear, in the second pass alone: D(q) of any crystal
from its primitive cell.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from coset.edge_model import Quadrature, edge_gradient
from coset.errors import ConfigError
from coset.neighbors import Edges, edge_vectors, neighbor_list
from coset.potential import ModelPotential
from coset.structures import Structures

CHUNK = 16
"""Columns in one backward pass; more need more memory."""


def hessian(
    potential: ModelPotential, one: Structures, quadrature: Quadrature | None = None
) -> Float[Tensor, "atoms 3 atoms 3"]:
    """H = d²E/dx dx in eV/Å², float64, of one system; periodic images move together.

    quadrature: average over these rotations instead of those of the potential. The Hessian of one
    frame is not invariant: project it on the group of the structure.
    """
    response = _Response(potential, one, quadrature)
    dim = 3 * len(one.atomic_numbers)
    parts = [response.columns(part) for part in torch.split(torch.arange(dim), 2 * CHUNK)]
    return torch.cat(parts).mT.reshape(dim // 3, 3, dim // 3, 3)


def dynamical_matrices(
    potential: ModelPotential,
    one: Structures,
    q_points: Float[Tensor, "points 3"],
    masses: Float[Tensor, " atoms"] | None = None,
    quadrature: Quadrature | None = None,
) -> Complex[Tensor, "points dim dim"]:
    """D_jj'(q) = sum_S Phi(j 0, j' S) e^(2 pi i q.S)/sqrt(m_j m_j'), complex, from one cell.

    q: fractional, in the lattice phase (D is periodic in q). Without masses (amu): in eV/Å².
    """
    response = _Response(potential, one, quadrature)
    n = len(one.atomic_numbers)
    places = torch.arange(len(q_points) * 3 * n)
    parts = [
        response.bloch_columns(part % (3 * n), q_points[part // (3 * n)])
        for part in torch.split(places, CHUNK)
    ]
    matrices = torch.cat(parts).reshape(len(q_points), 3 * n, 3 * n).mT
    if masses is None:
        return matrices
    root = masses.double().sqrt().repeat_interleave(3)
    return matrices / (root[:, None] * root[None, :])


class _Response:
    """The graph of g of one system, and what follows from it."""

    def __init__(self, potential: ModelPotential, one: Structures, rule: Quadrature | None) -> None:
        if len(one) != 1:
            raise ConfigError(f"{len(one)} systems given, expected one")
        structures = one.to(torch.float64).to(potential.baseline.device)
        self.graph = neighbor_list(structures, potential.cutoff)
        self.vectors = edge_vectors(structures, self.graph).requires_grad_()
        self.exchange = BlochExchange()
        _, self.gradient = edge_gradient(
            potential.model,
            self.graph,
            self.vectors,
            rule or potential.quadrature,
            outputs=potential.outputs,
            exchange=self.exchange,
            create_graph=True,
        )

    def columns(self, column: Int[Tensor, " columns"]) -> Float[Tensor, "columns dim"]:
        """Columns of the Hessian."""
        self.exchange.q = None
        ones = self.vectors.new_ones(len(column), len(self.vectors))
        seeds = self._seeds(column, ones)
        return self._gathered(torch.func.vmap(self._pull)(seeds), ones)

    def bloch_columns(
        self, column: Int[Tensor, " columns"], q: Float[Tensor, "columns 3"]
    ) -> Complex[Tensor, "columns dim"]:
        """Columns of the Hessian of Bloch waves, each with its own wave vector."""
        self.exchange.q = q
        phase = _phases(q, self.graph.cell_shifts)
        seeds = torch.view_as_real(self._seeds(column, phase)).movedim(-1, 1).flatten(0, 1)
        pulled = torch.func.vmap(self._pull)(seeds)
        pairs = pulled.reshape(len(q), 2, *self.vectors.shape).movedim(1, -1)
        return self._gathered(torch.view_as_complex(pairs.contiguous()), phase)

    def _seeds(self, column: Tensor, phase: Tensor) -> Tensor:
        """v_e of every column: 1 times its phase where the neighbor moves, -1 where the center."""
        atom, axis = (column // 3)[:, None], column % 3
        moved = (self.graph.neighbors == atom) * phase - (self.graph.centers == atom).to(phase)
        seeds = phase.new_zeros(len(column), *self.vectors.shape)
        seeds[torch.arange(len(column)), :, axis] = moved
        return seeds

    def _pull(self, seed: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(
            self.gradient, self.vectors, seed, retain_graph=True, materialize_grads=True
        )
        return found

    def _gathered(self, response: Tensor, phase: Tensor) -> Tensor:
        """Sum of G_e over edges to an atom, with the phase taken back, less that over its own."""
        n = len(self.graph.atomic_numbers)
        total = response.new_zeros(len(response), n, 3)
        total = total.index_add(1, self.graph.neighbors, response * phase.conj()[:, :, None])
        return total.index_add(1, self.graph.centers, -response).flatten(1)


@dataclass(slots=True)
class BlochExchange:
    """The exchange between cells: plain for a periodic crystal, with phases for its response.

    A batch of cotangents under `torch.func.vmap` is (re, im) of one column after the other, with
    the wave vectors q [columns, 3]; without q it is plain. Responses of atoms in cell S carry
    e^(2 pi i q.S), cotangents on their way back its conjugate.
    """

    q: Tensor | None = None

    def reverse(
        self, messages: Float[Tensor, "rotations kept width"], graph: Edges
    ) -> Float[Tensor, "rotations kept width"]:
        """Message of the reverse edge."""
        gathered: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
            messages, graph.reverse, graph.cell_shifts, 1, messages.shape[1], self
        )
        return gathered

    def to_neighbors(
        self, values: Float[Tensor, " atoms"], graph: Edges
    ) -> Float[Tensor, " edges"]:
        """Value of the neighbor."""
        gathered: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
            values, graph.neighbors, graph.cell_shifts, 0, values.shape[0], self
        )
        return gathered

    def turned(self, values: Tensor, shifts: Tensor, dim: int, *, back: bool) -> Tensor:
        """A batch of (re, im) pairs times the phase of every edge along `dim` of its members."""
        if self.q is None:
            return values
        pairs = values.reshape(len(self.q), 2, *values.shape[1:]).movedim(1, -1).contiguous()
        phase = _phases(self.q, shifts)
        phase = phase.conj() if back else phase
        shape = [len(self.q)] + [1] * (values.ndim - 1)
        shape[1 + dim] = len(shifts)
        turned = torch.view_as_complex(pairs.double()) * phase.reshape(shape)
        return torch.view_as_real(turned).movedim(-1, 1).flatten(0, 1).to(values.dtype)


class _Gather(torch.autograd.Function):
    """values[index] along a dimension; its transpose is `_Scatter`."""

    @staticmethod
    def forward(
        values: Tensor, index: Tensor, shifts: Tensor, dim: int, size: int, bloch: BlochExchange
    ) -> Tensor:
        return values.index_select(dim, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        _, index, shifts, *ctx.facts = inputs
        ctx.save_for_backward(index, shifts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        by_values = _Scatter.apply(grad, *ctx.saved_tensors, *ctx.facts)  # type: ignore[no-untyped-call]
        return by_values, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[Any, ...],
        values: Tensor,
        index: Tensor,
        shifts: Tensor,
        dim: int,
        size: int,
        bloch: BlochExchange,
    ) -> tuple[Tensor, int]:
        batch = values.movedim(in_dims[0], 0).index_select(dim + 1, index)
        return bloch.turned(batch, shifts, dim, back=False), 0


class _Scatter(torch.autograd.Function):
    """Sums into rows `index` of a dimension; its transpose is `_Gather`."""

    @staticmethod
    def forward(
        values: Tensor, index: Tensor, shifts: Tensor, dim: int, size: int, bloch: BlochExchange
    ) -> Tensor:
        shape = list(values.shape)
        shape[dim] = size
        return values.new_zeros(shape).index_add(dim, index, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        _, index, shifts, *ctx.facts = inputs
        ctx.save_for_backward(index, shifts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        by_values = _Gather.apply(grad, *ctx.saved_tensors, *ctx.facts)  # type: ignore[no-untyped-call]
        return by_values, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[Any, ...],
        values: Tensor,
        index: Tensor,
        shifts: Tensor,
        dim: int,
        size: int,
        bloch: BlochExchange,
    ) -> tuple[Tensor, int]:
        batch = values.movedim(in_dims[0], 0)
        turned = bloch.turned(batch, shifts, dim, back=True)
        shape = list(turned.shape)
        shape[dim + 1] = size
        return turned.new_zeros(shape).index_add(dim + 1, index, turned), 0


def _phases(q: Float[Tensor, "columns 3"], shifts: Int[Tensor, "edges 3"]) -> Tensor:
    """e^(2 pi i q.S), [columns, edges], complex."""
    angle = 2.0 * torch.pi * q.double() @ shifts.double().mT
    return torch.polar(torch.ones_like(angle), angle)
