"""Second derivatives of the energy: exact Hessian columns, and dynamical matrices at any q.

One graph of g = dE/dr_e serves all columns. A displacement v of atoms changes edge vectors by
v_e = v_neighbor - v_center, so

    (H v)_i = sum_(neighbor i) G_e - sum_(center i) G_e,    G_e = d(sum_e g_e . v_e)/dr_e.

For v_j e^(2 pi i q.S) on the atoms of cell S, every quantity of cell S responds with the factor
e^(2 pi i q.S) times that of cell 0. Inside one atom's environment real Jacobians act; cells meet
only in the `Exchange`, and there the factors appear, in the second pass alone: D(q) of any crystal
from its primitive cell.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from coset.edge_model import INDEXING, Exchange, Quadrature, edge_gradient
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
    response = _Response(potential, one, quadrature or potential.quadrature, INDEXING)
    n = len(one.atomic_numbers)
    rows = torch.arange(3 * n)
    columns = [response(atom, axis) for atom, axis in zip(rows // 3, rows % 3, strict=True)]
    return torch.stack(columns, dim=-1).reshape(n, 3, n, 3)


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
    bloch = BlochExchange()
    response = _Response(potential, one, quadrature or potential.quadrature, bloch)
    n = len(one.atomic_numbers)
    places = torch.arange(len(q_points) * 3 * n)
    parts = [
        response.at(q_points[part // (3 * n)], part % (3 * n), bloch)
        for part in torch.split(places, CHUNK)
    ]
    matrices = torch.cat(parts).reshape(len(q_points), 3 * n, 3 * n).mT
    if masses is None:
        return matrices
    root = masses.double().sqrt().repeat_interleave(3)
    return matrices / (root[:, None] * root[None, :])


class _Response:
    """The graph of g of one system, and what follows from it."""

    def __init__(
        self, potential: ModelPotential, one: Structures, rule: Quadrature, exchange: Exchange
    ) -> None:
        if len(one) != 1:
            raise ConfigError(f"{len(one)} systems given, expected one")
        structures = one.to(torch.float64).to(potential.baseline.device)
        self.graph = neighbor_list(structures, potential.cutoff)
        self.vectors = edge_vectors(structures, self.graph).requires_grad_()
        _, self.gradient = edge_gradient(
            potential.model,
            self.graph,
            self.vectors,
            rule,
            outputs=potential.outputs,
            exchange=exchange,
            create_graph=True,
        )

    def __call__(self, atom: Tensor, axis: Tensor) -> Float[Tensor, " dim"]:
        """Column of the Hessian: forces (with the other sign) per displacement."""
        graph = self.graph
        seed = torch.zeros_like(self.vectors)
        moved = (graph.neighbors == atom).double() - (graph.centers == atom).double()
        seed[:, axis] = moved
        (response,) = torch.autograd.grad(
            self.gradient, self.vectors, seed, retain_graph=True, materialize_grads=True
        )
        column = response.new_zeros(len(graph.atomic_numbers), 3)
        column = column.index_add(0, graph.neighbors, response)
        return column.index_add(0, graph.centers, response, alpha=-1.0).reshape(-1)

    def at(
        self, q: Float[Tensor, "columns 3"], column: Int[Tensor, " columns"], bloch: "BlochExchange"
    ) -> Tensor:
        """Columns of the Bloch-transformed Hessian: [columns, dim], complex."""
        graph, n = self.graph, len(self.graph.atomic_numbers)
        bloch.q = q
        phase = _phases(q, graph.cell_shifts)
        atom, axis = column // 3, column % 3
        moved = (graph.neighbors == atom[:, None]) * phase - (
            graph.centers == atom[:, None]
        ).double()
        seeds = torch.zeros(len(q), *self.vectors.shape, dtype=torch.complex128)
        seeds[torch.arange(len(q)), :, axis] = moved
        pairs = torch.view_as_real(seeds).movedim(-1, 1).flatten(0, 1)

        def pull(seed: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(
                self.gradient, self.vectors, seed, retain_graph=True, materialize_grads=True
            )
            return found

        found = torch.func.vmap(pull)(pairs).reshape(len(q), 2, *self.vectors.shape).movedim(1, -1)
        response = torch.view_as_complex(found.contiguous())
        result = response.new_zeros(len(q), n, 3)
        result = result.index_add(1, graph.neighbors, response * phase.conj()[:, :, None])
        return result.index_add(1, graph.centers, -response).flatten(1)


@dataclass(slots=True)
class BlochExchange:
    """The exchange between cells: plain for a periodic crystal, with phases for its response.

    A batch of cotangents under `torch.func.vmap` is (re, im) of one column after the other, with
    the wave vectors q [columns, 3]. Responses of atoms in cell S carry e^(2 pi i q.S), cotangents
    on their way back its conjugate.
    """

    q: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.float64))

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
