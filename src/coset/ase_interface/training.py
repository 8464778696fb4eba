"""Labelled frames: structures with energies, forces and stresses, in the units of this package.

Labels are looked for in the results that ASE attached to a frame, in `info` and in `arrays`, under
the names energy, forces (force), stress, virial (virials) and energies (one per atom), alone or
with a prefix: dft_ or REF_, or the one that is asked for. Upper and lower case are the same.
`free_energy` is never taken. Stress and virial are 3 x 3 matrices, nine numbers, or six in ASE's
Voigt order xx, yy, zz, yz, xz, xy; stress = -virial / volume.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms

from coset.ase_interface.atoms import as_numpy, error_of, one_structure
from coset.ase_interface.files import iterate_frames
from coset.errors import StructureError, check_choice
from coset.structures import Structures, fault
from coset.units import ANGSTROM_PER_UNIT, EV_PER_UNIT

PREFIXES = ("", "dft_", "ref_")
NAMES = {
    "energy": ("energy",),
    "forces": ("forces", "force"),
    "stress": ("stress",),
    "virial": ("virial", "virials"),
    "atomic energies": ("energies",),
}
VOIGT_OF_MATRIX = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelReading:
    """How the labels of a file are written.

    energy_unit: a key of `EV_PER_UNIT`; length_unit: one of `ANGSTROM_PER_UNIT`, of positions and
    cells; forces are energy / length, stress is energy / length³. stress_sign: what is positive
    in the file, tension (as in ASE) or compression; a virial has the opposite sign of its stress.
    prefix: of the names of the labels; None takes the only one of `PREFIXES` that occurs.
    """

    energy_unit: str = "eV"
    length_unit: str = "A"
    stress_sign: Literal["tension", "compression"] = "tension"
    prefix: str | None = None

    def __post_init__(self) -> None:
        """Refuse unknown units."""
        check_choice("energy_unit", self.energy_unit, tuple(EV_PER_UNIT))
        check_choice("length_unit", self.length_unit, tuple(ANGSTROM_PER_UNIT))
        check_choice("stress_sign", self.stress_sign, ("tension", "compression"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledFrame:
    """One frame with its labels; what is missing or not finite is NaN.

    positions [n, 3] and cell [3, 3] in Å, energy in eV, forces [n, 3] in eV/Å, stress [3, 3] in
    eV/Å³, positive in tension, atomic_energies [n] in eV. spoiled: labels that are not finite.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    charge: int
    spin_multiplicity: int
    energy: float
    forces: np.ndarray
    stress: np.ndarray
    atomic_energies: np.ndarray
    spoiled: tuple[str, ...]


def read_labelled(path: str, reading: LabelReading) -> Iterator[LabelledFrame | StructureError]:
    """Every frame of a file that ASE reads, or why it cannot be used; nothing is raised."""
    for frame in iterate_frames(path):
        if frame.atoms is None:
            yield frame.error or error_of("UnreadableFile", "file", "no frame", path)
            continue
        try:
            yield labelled(frame.atoms, reading, f"{path}@{frame.index}")
        except StructureError as error:
            yield error


def labelled(atoms: Atoms, reading: LabelReading, name: str = "0") -> LabelledFrame:
    """One frame with its labels, converted; `name` is what errors call it.

    Raises:
        StructureError: codes AmbiguousLabels, BadLabel, or those of `from_ase` and `fault`.
    """
    one = one_structure(atoms, name)
    if error := fault(one, name):
        raise error
    n_atoms = len(one.atomic_numbers)
    table = _table(atoms)
    prefix = _prefix(table, name) if reading.prefix is None else reading.prefix.casefold()
    found: dict[str, np.ndarray] = {}
    spoiled = []
    for label, size in zip(NAMES, (1, 3 * n_atoms, 9, 9, n_atoms), strict=True):
        values = _values(table, label, prefix, size, name)
        if values is not None and np.isfinite(values).all():
            found[label] = values
        elif values is not None:
            spoiled.append(label)
    energy = EV_PER_UNIT[reading.energy_unit]
    length = ANGSTROM_PER_UNIT[reading.length_unit]
    return LabelledFrame(
        numbers=one.atomic_numbers.numpy().astype(np.uint8),
        positions=as_numpy(one.positions) * length,
        cell=as_numpy(one.cell[0]) * length,
        pbc=one.pbc[0].numpy(),
        charge=int(one.charge),
        spin_multiplicity=int(one.spin_multiplicity),
        energy=float(_or_nan(found, "energy", 1)[0]) * energy,
        forces=_or_nan(found, "forces", 3 * n_atoms).reshape(-1, 3) * energy / length,
        stress=_stress(found, one, reading) * energy / length**3,
        atomic_energies=_or_nan(found, "atomic energies", n_atoms) * energy,
        spoiled=tuple(spoiled),
    )


def _table(atoms: Atoms) -> dict[str, Any]:
    """Everything a frame carries, by its name in lower case."""
    results: Mapping[str, Any] = atoms.calc.results if atoms.calc is not None else {}
    everything = (*atoms.arrays.items(), *atoms.info.items(), *results.items())
    return {str(key).casefold(): value for key, value in everything}


def _prefix(table: Mapping[str, Any], name: str) -> str:
    """The prefix under which there are labels."""
    words = [*NAMES["energy"], *NAMES["forces"]]
    found = {p: p + w for p in PREFIXES for w in words if table.get(p + w) is not None}
    if len(found) > 1:
        message = f"several sets of labels: {', '.join(found.values())}"
        hint = "choose one by its prefix (--label-prefix)"
        raise error_of("AmbiguousLabels", "labels", message, name, hint)
    return next(iter(found), "")


def _values(
    table: Mapping[str, Any], label: str, prefix: str, size: int, name: str
) -> np.ndarray | None:
    """The numbers of one label in a row, or None where there is no such label."""
    keys = [prefix + word for word in NAMES[label] if table.get(prefix + word) is not None]
    if not keys:
        return None
    values = np.asarray(table[keys[0]])
    if values.dtype.kind not in "fiu" or values.size not in ((6, 9) if size == 9 else (size,)):
        message = f"{keys[0]} has type {values.dtype} and shape {values.shape}"
        raise error_of("BadLabel", label, message, name, f"expected {size} numbers")
    return values.astype(np.float64).reshape(-1)


def _or_nan(found: Mapping[str, np.ndarray], label: str, size: int) -> np.ndarray:
    return found.get(label, np.full(size, np.nan))


def _stress(found: Mapping[str, np.ndarray], one: Structures, reading: LabelReading) -> np.ndarray:
    """Stress in the units of the file, symmetric, positive in tension."""
    values = found.get("stress")
    if values is None and "virial" in found:
        volume = float(one.volume)  # NaN unless periodic in three directions
        values = -found["virial"] / volume
    if values is None:
        return np.full((3, 3), np.nan)
    matrix = values[VOIGT_OF_MATRIX] if len(values) == 6 else values.reshape(3, 3)
    sign = 1.0 if reading.stress_sign == "tension" else -1.0
    symmetric: np.ndarray = sign * 0.5 * (matrix + matrix.T)
    return symmetric
