"""The graph: which atoms see which, in which periodic image.

Pairs are searched once (a half list); every pair becomes two edges, (i, j, S) and (j, i, -S), so
the reverse of an edge is known without a search, and r_ij = -r_ji holds to the last bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from vesin import NeighborList

from coset.errors import StructureError
from coset.structures import Structures, complete_cell, select

MAX_EDGES = 100_000_000
MIN_DISTANCE = 0.1
# Cells of the search grid over the cube of the fewest in one direction. Beyond 1e5/8, vesin 0.6
# may round the cells of a direction to none, and the process dies of a division by zero.
MAX_ELONGATION = 1e4


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edges:
    """The graph of a batch: integers only, sorted by center, never a gradient.

    Edge e points from atom i = centers[e] to the image S = cell_shifts[e] of atom j = neighbors[e];
    reverse[e] is the row of (j, i, -S). `target_index` chooses among the energy heads asked for.
    """

    centers: Int[Tensor, " edges"]
    neighbors: Int[Tensor, " edges"]
    cell_shifts: Int[Tensor, "edges 3"]
    reverse: Int[Tensor, " edges"]
    atomic_numbers: Int[Tensor, " atoms"]
    system_index: Int[Tensor, " atoms"]
    charge: Int[Tensor, " systems"]
    spin_multiplicity: Int[Tensor, " systems"]
    target_index: Int[Tensor, " systems"]

    def subset(self, kept: Int[Tensor, " kept"]) -> "Edges":
        """The graph of the given rows (ascending; with each edge its reverse)."""
        row_of = self.reverse.new_zeros(len(self.reverse))
        row_of[kept] = torch.arange(len(kept), device=kept.device)
        return replace(
            self,
            centers=self.centers[kept],
            neighbors=self.neighbors[kept],
            cell_shifts=self.cell_shifts[kept],
            reverse=row_of[self.reverse[kept]],
        )

    def to(self, device: torch.device | str) -> "Edges":
        """The same graph on another device."""
        return Edges(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def neighbor_list(structures: Structures, cutoff: float) -> Edges:
    """All edges of length at most `cutoff` (Å), self-images included.

    Raises:
        StructureError: code `TooManyEdges`, before anything is allocated.
    """
    return assemble(structures, _all_pairs(structures, cutoff))


def batched_neighbor_lists(
    structures: Structures, cutoff: float, cost: Callable[[int, int], float], budget: float
) -> Iterator[tuple[Int[Tensor, " systems"], Structures, Edges]]:
    """Consecutive systems, cut so that the cost of a batch is at most `budget` (or one system).

    cost: of so many atoms with so many edges, additive over systems (bytes, say).
    Yields the numbers of the systems, the systems, and their graph.
    """
    pairs = _all_pairs(structures, cutoff)
    n_atoms = structures.n_atoms.tolist()
    costs = [cost(n, 2 * len(found[0])) for n, found in zip(n_atoms, pairs, strict=True)]
    for group in cut_by_budget(costs, budget):
        systems = torch.tensor(group)
        whole = len(group) == len(structures)
        batch = structures if whole else select(structures, systems.to(structures.cell.device))
        yield systems, batch, assemble(batch, [pairs[k] for k in group])


def cut_by_budget(costs: Sequence[float], budget: float) -> list[list[int]]:
    """Consecutive indices grouped so that the costs of a group sum to at most `budget`."""
    groups: list[list[int]] = []
    filled = 0.0
    for index, cost in enumerate(costs):
        if not groups or filled + cost > budget:
            groups.append([])
            filled = 0.0
        groups[-1].append(index)
        filled += cost
    return groups


def edge_vectors(structures: Structures, edges: Edges) -> Float[Tensor, "edges 3"]:
    """r_e = (x_j - x_i) + S cell, in Å; differentiable in positions and cell."""
    system = edges.system_index[edges.centers]
    shift = torch.einsum(
        "ei,eij->ej", edges.cell_shifts.to(structures.cell), structures.cell[system]
    )
    positions = structures.positions
    return (positions[edges.neighbors] - positions[edges.centers]) + shift


def overlap(one: Structures, name: str = "0") -> StructureError | None:
    """The error for two atoms closer than 0.1 Å, or None; takes a batch of one."""
    # Searched farther than needed: a search within 0.1 Å goes through thousands of small boxes.
    (first, second, shifts) = _all_pairs(one, 10 * MIN_DISTANCE)[0]
    if not len(first):
        return None
    vectors = one.positions[torch.from_numpy(second)] - one.positions[torch.from_numpy(first)]
    vectors = vectors + torch.from_numpy(shifts).to(one.cell) @ one.cell[0]
    distances = torch.linalg.norm(vectors, dim=1)
    nearest = int(distances.argmin())
    if (distance := float(distances[nearest])) >= MIN_DISTANCE:
        return None
    return StructureError(
        f"atoms {first[nearest]} and {second[nearest]} are {distance:.3g} Å apart, expected "
        f"at least {MIN_DISTANCE} Å",
        code="AtomsOverlap",
        structure_id=name,
        field="positions",
        hint="remove the duplicate site",
    )


def estimated_edges(structures: Structures, cutoff: float) -> Float[Tensor, " systems"]:
    """Expected number of edges: atoms times those in a sphere, at most all pairs if open.

    In open directions the density is that of the atoms, spread over their extent and the cutoff.
    """
    n_atoms = structures.n_atoms.to(torch.float64)
    sphere = 4.0 / 3.0 * torch.pi * cutoff**3
    expected = n_atoms**2 * sphere / torch.linalg.det(_boxes(structures, cutoff)).abs()
    periodic = structures.pbc.any(dim=1)
    return torch.where(periodic, expected, torch.minimum(expected, n_atoms**2))


def _boxes(structures: Structures, margin: float) -> Float[Tensor, "systems 3 3"]:
    """Lattices, in open directions as long as the extent of the atoms and a margin; float64."""
    pbc, system = structures.pbc, structures.system_index
    box = complete_cell(structures.cell.detach().double(), pbc)
    if bool(pbc.all()):
        return box
    along = torch.einsum("ai,aki->ak", structures.positions.detach().double(), box[system])
    ends, rows = along.new_full((len(structures), 3), -torch.inf), system[:, None].expand(-1, 3)
    high = ends.scatter_reduce(0, rows, along, "amax")
    low = -ends.scatter_reduce(0, rows, -along, "amax")
    length = torch.where(pbc, 1.0, (high - low).clamp_min(0.0) + margin)
    return box * length[:, :, None]


def _all_pairs(structures: Structures, cutoff: float) -> list[Pairs]:
    """Half list of every system, atoms counted from the first of the system."""
    structures = _without_gaps(structures, 2.0 * cutoff)
    _refuse_too_many(structures, cutoff)
    positions = structures.positions.detach().to("cpu", torch.float64).numpy()
    # Beyond a margin of the cutoff there are no images to find, so the fully periodic search serves
    # all; that of vesin for partly periodic cells takes seconds where the cutoff is small.
    boxes = _boxes(structures, 2.0 * cutoff).cpu()
    _refuse_elongated(boxes, cutoff)
    ends = torch.cumsum(structures.n_atoms.cpu(), 0).tolist()
    search = NeighborList(cutoff=cutoff, full_list=False, n_threads=1)
    pairs = []
    for start, end, box in zip([0, *ends[:-1]], ends, boxes.numpy(), strict=True):
        first, second, shifts = search.compute(positions[start:end], box, True, "ijS")
        pairs.append((first.astype(np.int64), second.astype(np.int64), shifts.astype(np.int64)))
    return pairs


def _without_gaps(structures: Structures, widest: float) -> Structures:
    """Empty stretches along open directions cut to `widest` (Å); float64.

    Atoms on one side keep their distances, those on two sides stay at least `widest` apart.
    """
    if bool(structures.pbc.all()):
        return structures
    system, pbc = structures.system_index, structures.pbc
    normals = complete_cell(structures.cell.detach().double(), pbc)
    positions = structures.positions.detach().double()
    for axis in range(3):
        vectors = normals[system, axis]
        along = (positions * vectors).sum(dim=1)
        order = torch.argsort(along)
        order = order[torch.argsort(system[order], stable=True)]
        gaps = torch.diff(along[order])
        same = torch.diff(system[order]) == 0
        excess = torch.where(same, (gaps - widest).clamp_min(0.0), 0.0)
        sums = torch.cat([excess.new_zeros(1), torch.cumsum(excess, 0)])[: len(along)]
        first = torch.cumsum(structures.n_atoms, 0) - structures.n_atoms
        cut = torch.zeros_like(along)
        cut[order] = sums - sums[first[system[order]]]
        cut[pbc[system, axis]] = 0.0
        positions = positions - cut[:, None] * vectors
    return replace(structures, positions=positions)


def _refuse_elongated(boxes: Float[Tensor, "systems 3 3"], cutoff: float) -> None:
    heights = 1.0 / torch.linalg.norm(torch.linalg.inv(boxes), dim=1)
    cells = torch.floor(heights / cutoff).clamp_min(1.0)
    elongation = cells.prod(dim=1) / cells.min(dim=1).values ** 3
    if len(elongation) and float(elongation.max()) > MAX_ELONGATION:
        worst = int(elongation.argmax())
        low, high = float(heights[worst].min()), float(heights[worst].max())
        raise StructureError(
            f"the cell is {high:.3g} Å high in one direction and {low:.3g} Å in another, too "
            f"elongated for a search within {cutoff} Å",
            code="CellTooElongated",
            structure_id=str(worst),
            field="cell",
            hint="set pbc to false across a vacuum",
        )


def _refuse_too_many(structures: Structures, cutoff: float) -> None:
    expected = estimated_edges(structures, cutoff)
    if len(expected) and float(expected.max()) > MAX_EDGES:
        worst = int(expected.argmax())
        raise StructureError(
            f"about {float(expected[worst]):.2e} edges within {cutoff} Å, limit {MAX_EDGES:.0e}",
            code="TooManyEdges",
            structure_id=str(worst),
            field="cell",
            hint="check the units of cell and positions",
        )


def assemble(structures: Structures, pairs: Sequence[Pairs]) -> Edges:
    """Both directions of every pair, sorted by center; the reverse by bookkeeping alone."""
    counts = structures.n_atoms.cpu().numpy()
    offsets = np.cumsum(counts) - counts
    first = np.concatenate([p[0] + o for p, o in zip(pairs, offsets, strict=True)])
    second = np.concatenate([p[1] + o for p, o in zip(pairs, offsets, strict=True)])
    shifts = np.concatenate([p[2] for p in pairs])
    n_pairs = len(first)
    centers = np.concatenate([first, second])
    narrow = np.uint16 if counts.sum() <= np.iinfo(np.uint16).max else np.int64
    order = np.argsort(centers.astype(narrow), kind="stable")  # 16 bits: a radix sort
    row_of = np.empty_like(order)
    row_of[order] = np.arange(2 * n_pairs)
    reverse = row_of[(order + n_pairs) % max(2 * n_pairs, 1)]
    device = structures.cell.device
    return Edges(
        centers=torch.from_numpy(centers[order]).to(device),
        neighbors=torch.from_numpy(np.concatenate([second, first])[order]).to(device),
        cell_shifts=torch.from_numpy(np.concatenate([shifts, -shifts])[order]).to(device),
        reverse=torch.from_numpy(reverse).to(device),
        atomic_numbers=structures.atomic_numbers,
        system_index=structures.system_index,
        charge=structures.charge,
        spin_multiplicity=structures.spin_multiplicity,
        target_index=torch.zeros_like(structures.charge),
    )
