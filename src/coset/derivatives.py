"""Second derivatives of the energy: exact Hessians, with strain, and dynamical matrices at any q.

One graph of g = dE/dr_e serves all columns. A displacement v of atoms changes edge vectors by
v_e = v_neighbor - v_center, so

    (H v)_i = sum_(neighbor i) G_e - sum_(center i) G_e,    G_e = d(sum_e g_e . v_e)/dr_e.

For v_j e^(2 pi i q.S) on the atoms of cell S, every quantity of cell S responds with the factor
e^(2 pi i q.S) times that of cell 0. Inside one atom's environment real Jacobians act; cells meet
only in the `Exchange`, and there the factors appear, in the second pass alone: D(q) of any crystal
from its primitive cell.

A strain moves r_e to (r_e + v_e)(1 + e), so it is one more seed, v_e = r_e e, on the same graph.
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

MOST_COLUMNS = 64
"""Columns in one backward pass; more need more memory."""

MOST_EDGES = 16_000
"""Columns times rotations times edges in one pass: more are slower, beyond the cache."""

SAME_POINT = 1e-12
"""Fraction of a reciprocal vector: phases e^(2 pi i q.S) that differ by no more than rounding."""

STRAINS = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""The independent components of a symmetric strain, in Voigt's order xx yy zz yz xz xy."""


def hessian(
    potential: ModelPotential, one: Structures, quadrature: Quadrature | None = None
) -> Float[Tensor, "atoms 3 atoms 3"]:
    """H = d²E/dx dx in eV/Å², float64, of one system; periodic images move together.

    quadrature: average over these rotations instead of those of the potential. The Hessian of one
    frame is not invariant: project it on the group of the structure.
    """
    (found,) = _Response(potential, _alone(one), quadrature).hessians()
    return found


def hessians(
    potential: ModelPotential, structures: Structures, quadrature: Quadrature | None = None
) -> list[Float[Tensor, "atoms 3 atoms 3"]]:
    """`hessian` of every system of a batch, in as many backward passes as the largest needs.

    No system knows another, so that one pass gives the same column of all of them.
    """
    return _Response(potential, structures, quadrature).hessians()


@dataclass(frozen=True, kw_only=True, slots=True)
class StrainDerivatives:
    """Derivatives of E(u, e) in displacements u and symmetric strains e, x -> (x + u)(1 + e).

    energy: eV. gradient: dE/du, eV/Å. strain_gradient: dE/de = V stress, eV.
    hessian: d²E/du du, eV/Å². internal_strain: d²E/du de, eV/Å. strain: d²E/de de, eV. Tensors are
    symmetric in the two indices of a strain. float64.
    """

    energy: Float[Tensor, ""]
    gradient: Float[Tensor, "atoms 3"]
    strain_gradient: Float[Tensor, "3 3"]
    hessian: Float[Tensor, "atoms 3 atoms 3"]
    internal_strain: Float[Tensor, "atoms 3 3 3"]
    strain: Float[Tensor, "3 3 3 3"]


def strain_derivatives(
    potential: ModelPotential, one: Structures, quadrature: Quadrature | None = None
) -> StrainDerivatives:
    """First and second derivatives of one crystal, periodic in 3D.

    quadrature: as for `hessian`.
    """
    response = _Response(potential, _alone(one), quadrature)
    n = len(one.atomic_numbers)
    basis = response.vectors.new_zeros(6, 3, 3)
    for row, (a, b) in enumerate(STRAINS):
        basis[row, a, b] += 0.5
        basis[row, b, a] += 0.5
    seeds = response.vectors.detach() @ basis
    pulled = response.pulled(seeds)
    gradient = response.gathered(response.gradient.detach()[None]).reshape(n, 3)
    # The edge vectors are (r + v)(1 + e): their mixed derivative brings in the gradient itself.
    mixed = response.gathered(pulled).reshape(6, n, 3) + gradient @ basis
    virial = torch.einsum("mea,ea->m", seeds, response.gradient.detach())
    index = torch.tensor([[0, 5, 4], [5, 1, 3], [4, 3, 2]], device=virial.device)
    strain = torch.einsum("mea,nea->mn", seeds, pulled)
    return StrainDerivatives(
        energy=response.energy,
        gradient=gradient,
        strain_gradient=virial[index],
        hessian=response.hessians()[0],
        internal_strain=mixed.permute(1, 2, 0)[:, :, index],
        strain=strain[index[:, :, None, None], index],
    )


def dynamical_matrices(
    potential: ModelPotential,
    one: Structures,
    q_points: Float[Tensor, "points 3"],
    masses: Float[Tensor, " atoms"] | None = None,
    quadrature: Quadrature | None = None,
) -> Complex[Tensor, "points dim dim"]:
    """D_jj'(q) = sum_S Phi(j 0, j' S) e^(2 pi i q.S)/sqrt(m_j m_j'), complex, from one cell.

    q: fractional, in the lattice phase (D is periodic in q). Without masses (amu): in eV/Å². Zero
    where no atom reaches another.
    """
    n = len(one.atomic_numbers)
    atoms = torch.arange(n, device=q_points.device)
    pairs = q_points.repeat_interleave(n, dim=0), atoms.repeat(len(q_points))
    columns = dynamical_columns(potential, one, *pairs, masses, quadrature)
    blocks = columns.reshape(len(q_points), n, 3 * n, 3)
    return blocks.transpose(1, 2).reshape(len(q_points), 3 * n, 3 * n)


def dynamical_columns(
    potential: ModelPotential,
    one: Structures,
    q_points: Float[Tensor, "pairs 3"],
    atoms: Int[Tensor, " pairs"],
    masses: Float[Tensor, " atoms"] | None = None,
    quadrature: Quadrature | None = None,
) -> Complex[Tensor, "pairs dim 3"]:
    """The three columns of D(q) that belong to an atom, for pairs of q and atom.

    As `dynamical_matrices`, which is all of them.
    """
    response = _Response(potential, _alone(one), quadrature)
    q, dim = q_points.to(response.vectors), 3 * len(one.atomic_numbers)
    columns = response.vectors.new_zeros(len(q), 3, dim, dtype=torch.complex128)
    if len(response.vectors):
        moved = 3 * atoms.to(q.device)[:, None] + torch.arange(3, device=q.device)
        real = ((2.0 * q - (2.0 * q).round()).abs() < SAME_POINT).all(1)
        for chosen, kind, chunk in (
            (real, response.real_columns, 2 * response.chunk),
            (~real, response.bloch_columns, response.chunk),
        ):
            if not bool(chosen.any()):
                continue
            places = moved[chosen].flatten(), q[chosen].repeat_interleave(3, dim=0)
            pieces = (torch.split(part, chunk) for part in places)
            parts = [kind(*piece) for piece in zip(*pieces, strict=True)]
            columns[chosen] = torch.cat(parts).reshape(-1, 3, dim)
    found = columns.mT
    if masses is None:
        return found
    root = masses.double().sqrt()
    return found / (root.repeat_interleave(3)[:, None] * root[atoms][:, None, None])


def _alone(one: Structures) -> Structures:
    if len(one) != 1:
        raise ConfigError(f"{len(one)} systems given, expected one")
    return one


class _Response:
    """The graph of g of a batch, and what follows from it; columns are those of every system."""

    def __init__(
        self, potential: ModelPotential, structures: Structures, rule: Quadrature | None
    ) -> None:
        structures = structures.to(torch.float64).to(potential.baseline.device)
        self.n_atoms = structures.n_atoms
        first = self.n_atoms.cumsum(0) - self.n_atoms
        self.graph = neighbor_list(structures, potential.cutoff)
        self.vectors = edge_vectors(structures, self.graph).requires_grad_()
        self.first = first[structures.system_index[self.graph.centers]]
        self.exchange = BlochExchange()
        quadrature = rule or potential.quadrature
        readout, self.gradient = edge_gradient(
            potential.model,
            self.graph,
            self.vectors,
            quadrature,
            outputs=potential.outputs,
            exchange=self.exchange,
            create_graph=True,
        )
        copies = len(quadrature.weights) * len(self.vectors)
        self.chunk = max(1, min(MOST_COLUMNS, MOST_EDGES // max(1, copies)))
        energies = readout.atomic_energies.detach()
        self.energy = (energies + potential.baseline[self.graph.atomic_numbers]).sum()

    def hessians(self) -> list[Float[Tensor, "atoms 3 atoms 3"]]:
        """All columns of every system."""
        most = 3 * int(self.n_atoms.max())
        columns = torch.arange(most, device=self.vectors.device)
        parts = [self._columns(part) for part in torch.split(columns, 2 * self.chunk)]
        counts = self.n_atoms.tolist()
        found = torch.split(torch.cat(parts), [3 * n for n in counts], dim=1)
        return [
            block[: 3 * n].mT.reshape(n, 3, n, 3) for n, block in zip(counts, found, strict=True)
        ]

    def _columns(self, column: Int[Tensor, " columns"]) -> Float[Tensor, "columns dim"]:
        ones = self.vectors.new_ones(len(column), len(self.vectors))
        return self.gathered(self.pulled(self._seeds(column, ones)))

    def pulled(self, seeds: Float[Tensor, "columns edges 3"]) -> Float[Tensor, "columns edges 3"]:
        """G_e for every seed v_e, with no phases."""
        self.exchange.q = None
        found: Tensor = torch.func.vmap(self._pull)(seeds)
        return found

    def bloch_columns(
        self, column: Int[Tensor, " columns"], q: Float[Tensor, "columns 3"]
    ) -> Complex[Tensor, "columns dim"]:
        """Columns of the Hessian of Bloch waves, each with its own wave vector."""
        self.exchange.q, self.exchange.real = q, False
        phase = _phases(q, self.graph.cell_shifts)
        seeds = torch.view_as_real(self._seeds(column, phase)).movedim(-1, 1).flatten(0, 1)
        pulled = torch.func.vmap(self._pull)(seeds)
        pairs = pulled.reshape(len(q), 2, *self.vectors.shape).movedim(1, -1)
        return self.gathered(torch.view_as_complex(pairs.contiguous()), phase)

    def real_columns(
        self, column: Int[Tensor, " columns"], q: Float[Tensor, "columns 3"]
    ) -> Complex[Tensor, "columns dim"]:
        """The same where 2q is integer: phases are 1 or -1, so that columns are real."""
        self.exchange.q, self.exchange.real = q, True
        phase = _phases(q, self.graph.cell_shifts).real
        pulled = torch.func.vmap(self._pull)(self._seeds(column, phase))
        return self.gathered(pulled, phase).to(torch.complex128)

    def _seeds(self, column: Tensor, phase: Tensor) -> Tensor:
        """v_e of every column: 1 times its phase where the neighbor moves, -1 where the center."""
        atom, axis = self.first + (column // 3)[:, None], column % 3
        moved = (self.graph.neighbors == atom) * phase - (self.graph.centers == atom).to(phase)
        seeds = phase.new_zeros(len(column), *self.vectors.shape)
        seeds[torch.arange(len(column), device=axis.device), :, axis] = moved
        return seeds

    def _pull(self, seed: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(
            self.gradient, self.vectors, seed, retain_graph=True, materialize_grads=True
        )
        return found

    def gathered(self, response: Tensor, phase: Tensor | None = None) -> Tensor:
        """Sum of G_e over edges to an atom, with the phase taken back, less that over its own."""
        n = len(self.graph.atomic_numbers)
        total = response.new_zeros(len(response), n, 3)
        turned = response if phase is None else response * phase.conj()[:, :, None]
        total = total.index_add(1, self.graph.neighbors, turned)
        return total.index_add(1, self.graph.centers, -response).flatten(1)


@dataclass(slots=True)
class BlochExchange:
    """The exchange between cells: plain for a periodic crystal, with phases for its response.

    A batch of cotangents under `torch.func.vmap` is (re, im) of one column after the other, with
    the wave vectors q [columns, 3]; `real`: one row a column, for 2q integer; without q it is
    plain. Responses of atoms in cell S carry
    e^(2 pi i q.S), cotangents on their way back its conjugate.
    """

    q: Tensor | None = None
    real: bool = False

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
        shape = [len(self.q)] + [1] * (values.ndim - 1)
        shape[1 + dim] = len(shifts)
        phase = _phases(self.q, shifts)
        if self.real:
            return values * phase.real.reshape(shape).to(values.dtype)
        pairs = values.reshape(len(self.q), 2, *values.shape[1:]).movedim(1, -1).contiguous()
        phase = phase.conj() if back else phase
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
