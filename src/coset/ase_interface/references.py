"""Reference energies for a convex hull: a JSON list, or frames that carry energies."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.data import atomic_numbers
from ase.formula import Formula

from coset.ase_interface.files import Loaded, read_structures
from coset.ase_interface.labels import labels_of
from coset.errors import StructureError
from coset.strict_json import refuse_depth
from coset.workflows.convex_hull import HullEntry

ENERGIES = ("energy_eV", "energy_per_atom_eV")
LEVELS = ("level_of_theory", "functional")
FIELDS = ("formula", "name", *ENERGIES, "energy_error_eV", "correction", *LEVELS)
"""What a JSON entry may hold; a frame has the same names in its info, and its own energy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class References:
    """Entries of a file, without energy (NaN) where it gives none; frames where it holds atoms."""

    entries: tuple[HullEntry, ...]
    loaded: tuple[Loaded, ...] = ()


def read_references(path: str) -> References:
    """Entries of a JSON list or of a file of structures; content decides.

    Raises:
        StructureError: an entry cannot be used; it is named by its place.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise StructureError(
            f"cannot read: {error}", code="CannotRead", structure_id=path
        ) from None
    if data.lstrip()[:1] in (b"[", b"{"):
        return References(entries=_of_json(data, path))
    loaded = read_structures([path])
    for one in loaded:
        if one.error is not None:
            raise one.error
    return References(entries=tuple(entry_of(one) for one in loaded), loaded=tuple(loaded))


def entry_of(loaded: Loaded) -> HullEntry:
    """The entry of a frame, named by its formula, with what its info and its energy say."""
    atoms = loaded.atoms
    assert atoms is not None
    where = f"{loaded.input}@{loaded.index}"
    table = {name: atoms.info[name] for name in FIELDS[1:] if name in atoms.info}
    energy = labels_of(atoms).energy
    if energy is not None and not any(name in table for name in ENERGIES):
        table["energy_eV"] = float(energy)
    name = str(table.pop("name", "")) or _formula(atoms)
    return _entry(name, Counter(atoms.numbers.tolist()), table, where)


def _of_json(data: bytes, path: str) -> tuple[HullEntry, ...]:
    try:
        text = data.decode()
        refuse_depth(text)
        rows = json.loads(text)
    except ValueError as error:
        raise _wrong(path, f"is no JSON: {error}") from None
    if not isinstance(rows, list):
        raise _wrong(path, "is a JSON object, expected a list of entries")
    return tuple(_of_row(row, f"{path}, entry {number}") for number, row in enumerate(rows))


def _of_row(row: object, where: str) -> HullEntry:
    if not isinstance(row, dict):
        raise _wrong(where, f"is {row!r:.40}, expected an object with {', '.join(FIELDS)}")
    for key in row:
        if key not in FIELDS:
            near = get_close_matches(str(key), FIELDS, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(FIELDS)}"
            raise _wrong(where, f"has the unknown key {key!r}{meant}")
    formula = row.get("formula")
    try:
        count = Formula(str(formula)).count()
        composition = {atomic_numbers[name]: n for name, n in count.items() if n}
    except (ValueError, KeyError):
        raise _wrong(where, f"has no formula that can be read: {formula!r:.40}") from None
    if not composition or not any(name in row for name in ENERGIES):
        raise _wrong(where, f"needs a formula and {' or '.join(ENERGIES)}")
    return _entry(str(row.get("name", formula)), composition, row, where)


def _entry(
    name: str, composition: Mapping[int, float], table: Mapping[str, Any], where: str
) -> HullEntry:
    """The entry of a table with one of the energies, or without any."""
    energy, per_atom = (_number(table, key, where) for key in ENERGIES)
    if energy is not None and per_atom is not None:
        raise _wrong(where, f"has both {' and '.join(ENERGIES)}")
    if energy is None:
        energy = float("nan") if per_atom is None else per_atom * sum(composition.values())
    level = next((str(table[name]) for name in LEVELS if table.get(name)), "")
    return HullEntry(
        name=name,
        composition=dict(composition),
        energy=energy,
        error=_number(table, "energy_error_eV", where) or 0.0,
        correction=_number(table, "correction", where) or 0.0,
        level_of_theory=level,
    )


def _number(table: Mapping[str, Any], name: str, where: str) -> float | None:
    value = table.get(name)
    if value is None:
        return None
    if isinstance(value, str | bool) or not math.isfinite(value):
        raise _wrong(where, f"has {name} = {value!r:.40}, expected a finite number")
    return float(value)


def _formula(atoms: Atoms) -> str:
    return str(atoms.symbols.formula.reduce()[0].format("metal"))


def _wrong(where: str, what: str) -> StructureError:
    return StructureError(f"{where} {what}", code="BadReference", field="references")
