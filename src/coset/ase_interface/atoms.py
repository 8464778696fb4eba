"""`Atoms` to `Structures` and back.

Charge and spin multiplicity are `atoms.info["charge"]` and `["spin"]`, 0 and 1 where absent.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from jaxtyping import Bool
from numpy import ndarray
from torch import Tensor

from coset.errors import StructureError
from coset.structures import Structures, concatenate, make_structure, split


def from_ase(atoms: Atoms | Sequence[Atoms]) -> Structures:
    """A batch of the given frames, copied; constraints are not part of it (see `fixed_atoms`).

    Raises:
        StructureError: codes BadArray, BadSpecies, ShapeMismatch, BadCharge, DisorderedStructure.
    """
    frames = [atoms] if isinstance(atoms, Atoms) else atoms
    return concatenate([one_structure(frame, str(k)) for k, frame in enumerate(frames)])


def to_ase(structures: Structures) -> list[Atoms]:
    """One `Atoms` per system; charge and spin only where they are not 0 and 1."""
    return [_atoms(one) for one in split(structures)]


def fixed_atoms(atoms: Atoms, name: str = "0") -> Bool[Tensor, " atoms"]:
    """Atoms held in all three directions by FixAtoms or FixCartesian.

    Raises:
        StructureError: code UnsupportedConstraint, for any other constraint.
    """
    held = np.zeros((len(atoms), 3), dtype=bool)
    for constraint in atoms.constraints:
        match constraint:
            case FixAtoms():
                held[constraint.index] = True
            case FixCartesian():
                held[constraint.index] |= constraint.mask
            case _:
                raise _constraint_error(f"{type(constraint).__name__} is not supported", name)
    some = held.any(axis=1) & ~held.all(axis=1)
    if some.any():
        raise _constraint_error(f"atom {some.argmax()} is fixed in some directions only", name)
    return torch.from_numpy(held.all(axis=1))


def one_structure(atoms: Atoms, name: str) -> Structures:
    """A batch of one; `name` is what errors call it."""
    if is_disordered(atoms):
        message = "some sites are occupied partially or by several species"
        hint = "order it first: one species per site, in a supercell if need be"
        raise error_of("DisorderedStructure", "occupancy", message, name, hint)
    numbers = np.asarray(atoms.arrays["numbers"])
    if numbers.dtype.kind not in "iu":
        message = f"atomic numbers have type {numbers.dtype}, expected integers"
        raise error_of("BadSpecies", "atomic_numbers", message, name)
    positions = _lengths(atoms.arrays["positions"], "positions", name)
    if positions.shape != (len(numbers), 3):
        message = f"positions have shape {tuple(positions.shape)} for {len(numbers)} atomic numbers"
        raise error_of("ShapeMismatch", "positions", message, name)
    return make_structure(
        positions,
        torch.from_numpy(numbers.astype(np.int64)),
        cell=_lengths(atoms.cell.array, "cell", name),
        pbc=[bool(periodic) for periodic in atoms.pbc],
        charge=_whole_number(atoms, "charge", 0, name),
        spin_multiplicity=_whole_number(atoms, "spin", 1, name),
    )


def is_disordered(atoms: Atoms) -> bool:
    """Whether some site is occupied partially or by several species.

    From `info` (CIF: occupancies by site and species) or a column (PDB: all 0 if unknown).
    """
    column = np.asarray(atoms.arrays.get("occupancy", 1.0))
    if column.dtype.kind in "fiu" and column.any() and (column < 1).any():
        return True
    sites = atoms.info.get("occupancy")
    if not isinstance(sites, Mapping):
        return False
    return any(
        len(site) > 1 or any(_below_one(n) for n in site.values()) for site in sites.values()
    )


def as_numpy(tensor: Tensor) -> ndarray:
    """A copy in float64."""
    return tensor.detach().cpu().double().numpy().copy()


def error_of(code: str, field: str, message: str, name: str, hint: str = "") -> StructureError:
    """A StructureError about the structure `name`."""
    return StructureError(message, code=code, structure_id=name, field=field, hint=hint)


def _lengths(array: ndarray, field: str, name: str) -> Tensor:
    """A copy in float64, contiguous and writable whatever came."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        message = f"{field} have type {array.dtype}, expected floating point"
        raise error_of("BadArray", field, message, name)
    return torch.from_numpy(np.array(array, dtype=np.float64, order="C"))


def _whole_number(atoms: Atoms, key: str, default: int, name: str) -> int:
    value = atoms.info.get(key, default)
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if is_number and float(value).is_integer():
        return int(value)
    message = f"info[{key!r}] = {value!r}, expected an integer"
    raise error_of("BadCharge", key, message, name)


def _below_one(occupancy: object) -> bool:
    return isinstance(occupancy, int | float) and occupancy < 1


def _atoms(one: Structures) -> Atoms:
    given = {"charge": int(one.charge), "spin": int(one.spin_multiplicity)}
    usual = {"charge": 0, "spin": 1}
    return Atoms(
        numbers=one.atomic_numbers.cpu().numpy(),
        positions=as_numpy(one.positions),
        cell=as_numpy(one.cell[0]),
        pbc=one.pbc[0].tolist(),
        info={key: given[key] for key in given if given[key] != usual[key]},
    )


def _constraint_error(what: str, name: str) -> StructureError:
    hint = "hold atoms in all three directions (FixAtoms), or remove the constraint"
    return error_of("UnsupportedConstraint", "constraints", f"constraint: {what}", name, hint)
