"""Batches of structures and the properties predicted for them.

`Structures` holds S systems with A atoms in all, concatenated: one structure is a batch of one.
`Properties` holds predictions and labels alike. Both are frozen: functions return new objects.

Conventions: cell rows are lattice vectors (as in ASE), `volume = |det cell|`, rotations are active
(`positions @ R.T`, `cell @ R.T`), strains act on rows (`positions @ (1 + strain)`), and
stress = (1/V) dE/dstrain, positive in tension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coset.errors import StructureError

MAX_COORDINATE = 1e8
MIN_CELL_REGULARITY = 1e-3
PER_ATOM = ("positions", "atomic_numbers")
PER_SYSTEM = ("cell", "pbc", "charge", "spin_multiplicity")
PER_ATOM_PROPERTIES = ("forces", "atomic_energies", "direct_forces")


@dataclass(frozen=True, kw_only=True, slots=True)
class Structures:
    """S systems with A atoms in all (Å, atomic numbers, charges in e)."""

    positions: Float[Tensor, "atoms 3"]
    atomic_numbers: Int[Tensor, " atoms"]
    cell: Float[Tensor, "systems 3 3"]
    pbc: Bool[Tensor, "systems 3"]
    system_index: Int[Tensor, " atoms"]
    charge: Int[Tensor, " systems"]
    spin_multiplicity: Int[Tensor, " systems"]

    def __len__(self) -> int:
        """Number of systems."""
        return self.cell.shape[0]

    @property
    def n_atoms(self) -> Int[Tensor, " systems"]:
        """Atoms of each system."""
        return torch.bincount(self.system_index, minlength=len(self))

    @property
    def volume(self) -> Float[Tensor, " systems"]:
        """|det cell| in Å³, NaN where the system is not periodic in all three directions."""
        volume = torch.linalg.det(self.cell).abs()
        return torch.where(self.pbc.all(dim=1), volume, torch.nan)

    def to(self, target: torch.device | str | torch.dtype) -> "Structures":
        """The same structures on another device, or with lengths in another dtype."""
        if isinstance(target, torch.dtype):
            return replace(self, positions=self.positions.to(target), cell=self.cell.to(target))
        return Structures(**{f.name: getattr(self, f.name).to(target) for f in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Properties:
    """Predictions or labels; what was not asked for is None, what is undefined is NaN.

    energy: eV, total, float64. forces: eV/Å. stress: eV/Å³, symmetric, NaN unless periodic in 3D.
    torque: eV/rad, dE under rigid rotation about x, y, z: zero for an invariant model.
    atomic_energies: eV, baseline included. direct_forces, direct_stress: heads, not gradients.
    """

    energy: Float[Tensor, " systems"] | None = None
    forces: Float[Tensor, "atoms 3"] | None = None
    stress: Float[Tensor, "systems 3 3"] | None = None
    torque: Float[Tensor, "systems 3"] | None = None
    atomic_energies: Float[Tensor, " atoms"] | None = None
    direct_forces: Float[Tensor, "atoms 3"] | None = None
    direct_stress: Float[Tensor, "systems 3 3"] | None = None

    def to(self, device: torch.device | str) -> "Properties":
        """The same properties on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Properties(**{k: None if v is None else v.to(device) for k, v in moved.items()})


def make_structure(
    positions: Float[Tensor, "atoms 3"],
    atomic_numbers: Int[Tensor, " atoms"],
    *,
    cell: Float[Tensor, "3 3"] | None = None,
    pbc: Sequence[bool] = (False, False, False),
    charge: int = 0,
    spin_multiplicity: int = 1,
) -> Structures:
    """A batch of one system."""
    lattice = positions.new_zeros(3, 3) if cell is None else cell
    numbers = atomic_numbers.to(torch.int64)
    return Structures(
        positions=positions,
        atomic_numbers=numbers,
        cell=lattice[None],
        pbc=torch.tensor([list(pbc)], dtype=torch.bool, device=positions.device),
        system_index=torch.zeros_like(numbers),
        charge=numbers.new_full((1,), charge),
        spin_multiplicity=numbers.new_full((1,), spin_multiplicity),
    )


def concatenate(batches: Sequence[Structures]) -> Structures:
    """One batch with the systems of all, in order."""
    if not batches:
        raise StructureError("no structures given, expected at least one", code="EmptyStructure")
    offsets = [0]
    for batch in batches:
        offsets.append(offsets[-1] + len(batch))
    joined = {f.name: torch.cat([getattr(b, f.name) for b in batches]) for f in fields(Structures)}
    joined["system_index"] = torch.cat(
        [b.system_index + offset for b, offset in zip(batches, offsets, strict=False)]
    )
    return Structures(**joined)


def select(structures: Structures, systems: Int[Tensor, " selected"]) -> Structures:
    """The given systems, in the given order."""
    atoms, index = atoms_of(structures, systems)
    return Structures(
        positions=structures.positions[atoms],
        atomic_numbers=structures.atomic_numbers[atoms],
        cell=structures.cell[systems],
        pbc=structures.pbc[systems],
        system_index=index,
        charge=structures.charge[systems],
        spin_multiplicity=structures.spin_multiplicity[systems],
    )


def atoms_of(
    structures: Structures, systems: Int[Tensor, " selected"]
) -> tuple[Int[Tensor, " atoms"], Int[Tensor, " atoms"]]:
    """Rows of the atoms of the given systems, and for each its place in `systems`."""
    counts = structures.n_atoms
    first = torch.cumsum(counts, 0) - counts
    index = torch.repeat_interleave(counts[systems])
    start = torch.cumsum(counts[systems], 0) - counts[systems]
    rows = torch.arange(len(index), device=index.device)
    return rows - start[index] + first[systems][index], index


def split(structures: Structures) -> list[Structures]:
    """A batch of one for each system."""
    counts = structures.n_atoms.tolist()
    atoms = {name: torch.split(getattr(structures, name), counts) for name in PER_ATOM}
    systems = {name: torch.split(getattr(structures, name), 1) for name in PER_SYSTEM}
    zeros = torch.split(torch.zeros_like(structures.system_index), counts)
    return [
        Structures(
            **{name: pieces[k] for name, pieces in (atoms | systems).items()}, system_index=zeros[k]
        )
        for k in range(len(structures))
    ]


def properties_of(properties: Properties, structures: Structures, system: int) -> Properties:
    """The properties of one system of a batch."""
    atoms = structures.system_index == system

    def own(name: str) -> Tensor | None:
        value: Tensor | None = getattr(properties, name)
        if value is None:
            return None
        return value[atoms] if name in PER_ATOM_PROPERTIES else value[system : system + 1]

    return Properties(**{f.name: own(f.name) for f in fields(Properties)})


def join_properties(parts: Sequence[Properties]) -> Properties:
    """Properties of consecutive batches as those of one."""

    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else torch.cat(values)

    return Properties(**{f.name: join(f.name) for f in fields(Properties)})


def rotate(structures: Structures, rotation: Float[Tensor, "3 3"]) -> Structures:
    """Every system turned (or mirrored) by the orthogonal matrix R: x -> x R^T."""
    return replace(
        structures,
        positions=structures.positions @ rotation.mT,
        cell=structures.cell @ rotation.mT,
    )


def strain(structures: Structures, strain: Float[Tensor, "systems 3 3"]) -> Structures:
    """Every system deformed homogeneously: x -> x (1 + strain), cell -> cell (1 + strain)."""
    return deform(structures, torch.eye(3).to(strain) + strain)


def deform(structures: Structures, deformation: Float[Tensor, "systems 3 3"]) -> Structures:
    """Every system mapped by its own matrix D: x -> x D, cell -> cell D."""
    per_atom = deformation[structures.system_index]
    return replace(
        structures,
        positions=torch.einsum("ai,aij->aj", structures.positions, per_atom),
        cell=structures.cell @ deformation,
    )


def repeat(structures: Structures, repeats: tuple[int, int, int]) -> Structures:
    """Supercells of a batch: cell rows times `repeats`, atoms of image after image."""
    if min(repeats) < 1:
        raise StructureError(f"repeats = {repeats}, expected three positive integers")
    if bool((~structures.pbc & (torch.tensor(repeats, device=structures.pbc.device) > 1)).any()):
        raise StructureError(f"repeats = {repeats} along a direction that is not periodic")
    return concatenate([_repeat_one(one, repeats) for one in split(structures)])


def _repeat_one(one: Structures, repeats: tuple[int, int, int]) -> Structures:
    grid = torch.cartesian_prod(*(torch.arange(n, device=one.cell.device) for n in repeats))
    shifts = grid.reshape(-1, 3).to(one.cell) @ one.cell[0]
    n_images = len(shifts)
    factors = torch.tensor(repeats).to(one.cell)
    return replace(
        one,
        positions=(one.positions[None] + shifts[:, None]).reshape(-1, 3),
        atomic_numbers=one.atomic_numbers.repeat(n_images),
        system_index=one.system_index.repeat(n_images),
        cell=one.cell * factors[:, None],
    )


def inverse_cell(
    cell: Float[Tensor, "systems 3 3"], pbc: Bool[Tensor, "systems 3"]
) -> Float[Tensor, "systems 3 3"]:
    """Inverse of the lattice: fractional = positions @ inverse, exactly 0 in open directions.

    The vectors of open directions are replaced by normals, so they may be zero or arbitrary.
    """
    inverse: Tensor = torch.linalg.inv(complete_cell(cell, pbc))
    return inverse * pbc[:, None, :]


def complete_cell(
    cell: Float[Tensor, "systems 3 3"], pbc: Bool[Tensor, "systems 3"]
) -> Float[Tensor, "systems 3 3"]:
    """Lattice whose open directions are unit normals to the periodic ones."""
    if bool(pbc.all()):
        return cell
    periodic = torch.where(pbc[:, :, None], cell, torch.zeros_like(cell))
    _, _, normals = torch.linalg.svd(periodic)
    complete = periodic.clone()
    for system, mask in enumerate(pbc.tolist()):
        n_periodic = sum(mask)
        if n_periodic < 3:
            complete[system, ~pbc[system]] = normals[system, n_periodic:]
    return complete


def wrap(structures: Structures) -> Structures:
    """Atoms moved into the cell along periodic directions (shorter sums round less)."""
    shifts = wrapping_shifts(structures)
    per_atom = structures.cell[structures.system_index]
    moved = structures.positions - torch.einsum("ai,aij->aj", shifts, per_atom)
    return replace(structures, positions=moved)


def wrapping_shifts(structures: Structures) -> Float[Tensor, "atoms 3"]:
    """Integer cell shifts that `wrap` subtracts."""
    inverse = inverse_cell(structures.cell, structures.pbc)[structures.system_index]
    return torch.floor(torch.einsum("ai,aij->aj", structures.positions, inverse))


def regularity(cell: Float[Tensor, "systems 3 3"], pbc: Bool[Tensor, "systems 3"]) -> Tensor:
    """Volume of the periodic vectors over the product of their lengths, 1 if none: [systems]."""
    unit = torch.where(pbc, torch.linalg.norm(cell, dim=2), torch.ones_like(cell[:, :, 0]))
    volume: Tensor = torch.linalg.det(complete_cell(cell, pbc)).abs()
    return volume / unit.clamp_min(1e-300).prod(dim=1)


def validate(structures: Structures, identifiers: Sequence[str] | None = None) -> None:
    """Raise a StructureError for the first system that no model can take."""
    if not len(structures):
        raise StructureError("no structures given, expected at least one", code="EmptyStructure")
    if _all_sound(structures):
        return
    names = identifiers or [str(k) for k in range(len(structures))]
    for one, name in zip(split(structures), names, strict=True):
        if error := fault(one, name):
            raise error


def _all_sound(structures: Structures) -> bool:
    """Whether no system can have a fault, decided for the whole batch at once."""
    numbers, cell, pbc = structures.atomic_numbers, structures.cell, structures.pbc
    if len(structures.positions) != len(numbers) or not len(numbers):
        return False
    farthest = torch.maximum(structures.positions.abs().max(), cell.abs().max())
    if not bool(farthest <= MAX_COORDINATE):  # NaN too
        return False
    return bool(
        (regularity(cell, pbc).min() >= MIN_CELL_REGULARITY)
        & (numbers.min() >= 1)
        & (numbers.max() <= 118)
        & (structures.n_atoms.min() > 0)
    )


def fault(one: Structures, name: str = "0") -> StructureError | None:
    """What is wrong with a batch of one (shapes, species, finiteness, cell), or None."""
    for check in (_shape_fault, _finite_fault, _species_fault, _cell_fault):
        if found := check(one):
            code, field, message, hint = found
            return StructureError(message, code=code, structure_id=name, field=field, hint=hint)
    return None


Fault = tuple[str, str, str, str]


def _shape_fault(one: Structures) -> Fault | None:
    n_atoms = len(one.atomic_numbers)
    if one.positions.shape != (n_atoms, 3):
        message = f"positions have shape {tuple(one.positions.shape)} for {n_atoms} atomic numbers"
        return "ShapeMismatch", "positions", message, f"give an array of shape ({n_atoms}, 3)"
    if n_atoms == 0:
        return "EmptyStructure", "positions", "no atoms", "remove it from the input"
    return None


def _finite_fault(one: Structures) -> Fault | None:
    for field in ("positions", "cell"):
        array = getattr(one, field)
        if not torch.isfinite(array).all():
            bad = torch.nonzero(~torch.isfinite(array))[0].tolist()[-2:]
            return "NonFiniteInput", field, f"{field}{bad} is not finite", "repair the input file"
        if array.numel() and float(array.abs().max()) > MAX_COORDINATE:
            message = f"{field} reach {float(array.abs().max()):.3g} Å, limit {MAX_COORDINATE:.0e}"
            return "NonFiniteInput", field, message, "check the units"
    return None


def _species_fault(one: Structures) -> Fault | None:
    numbers = one.atomic_numbers
    if bool((numbers == 0).any()):
        at = int(torch.nonzero(numbers == 0)[0])
        hint = "remove it, or pass --drop-ghosts"
        return "GhostAtom", "atomic_numbers", f"atom {at} is a ghost or dummy (Z = 0)", hint
    if bool(((numbers < 1) | (numbers > 118)).any()):
        at = int(torch.nonzero((numbers < 1) | (numbers > 118))[0])
        message = f"atom {at} has atomic number {int(numbers[at])}"
        return "BadSpecies", "atomic_numbers", message, "atomic numbers run from 1 to 118"
    return None


def _cell_fault(one: Structures) -> Fault | None:
    lengths = torch.linalg.norm(one.cell[0], dim=1)
    for axis in range(3):
        if bool(one.pbc[0, axis]) and float(lengths[axis]) == 0.0:
            message = f"pbc is true along axis {axis} but the cell vector is zero"
            return "PbcWithoutVector", "cell", message, "set pbc to false there or give the vector"
    value = float(regularity(one.cell, one.pbc)[0])
    if value < MIN_CELL_REGULARITY:
        message = f"the cell is singular (volume / edge lengths = {value:.2g})"
        return "SingularCell", "cell", message, f"expected at least {MIN_CELL_REGULARITY}"
    return None
