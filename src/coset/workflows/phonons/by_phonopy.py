"""What phonopy, symfc and seekpath do for us: masses, path, projection, DOS, polar terms, files.

Our dynamical matrices have the lattice phase, those of phonopy the position phase:
D_phonopy = U† D U, U = diag(e^(2 pi i q.tau)).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Int
from numpy import ndarray

from coset.errors import StructureError
from coset.structures import Structures
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.phonons.mesh import Mesh
from coset.workflows.phonons.modes import is_gamma

if TYPE_CHECKING:
    from phonopy import Phonopy
    from phonopy.harmonic.dynamical_matrix import NacParams
    from phonopy.structure.atoms import PhonopyAtoms
    from phonopy.structure.cells import Primitive

SYMPREC = 1e-5
FILES = ("phonopy_params.yaml", "FORCE_CONSTANTS")
SEGMENT_POINTS = 51
DOS_POINTS = 400
SMALLEST_SPAN = 1e-3  # THz


Pieces = tuple[tuple[str, ...], ...]
"""Names of points of the Brillouin zone, piece by piece of a path with jumps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BandPath:
    """A path through the Brillouin zone.

    q_points: fractional. distances: Å^-1 with 2 pi, along the path without its jumps. segments:
    first and last point of every straight piece. labels: of their ends.
    """

    q_points: Float[ndarray, "points 3"]
    distances: Float[ndarray, " points"]
    segments: tuple[tuple[int, int], ...]
    labels: tuple[tuple[str, str], ...]


def standard_masses(structures: Structures) -> Float[ndarray, " atoms"]:
    """Standard atomic masses in amu, those that phonopy takes."""
    return np.array(_atoms(structures).masses)


def band_path(primitive: Structures, wanted: Pieces | None = None) -> BandPath:
    """Between points of Hinuma et al., Comput. Mater. Sci. 128, 140 (2017), in the cell as it is.

    wanted: names of points, piece by piece; None for the standard path.

    Raises:
        StructureError: "NoBandPath", "UnknownBandPoint".
    """
    import seekpath  # noqa: PLC0415  # with spglib 0.2 s

    cell = primitive.cell[0].double().cpu().numpy()
    fractional = primitive.positions.double().cpu().numpy() @ np.linalg.inv(cell)
    crystal = cell, fractional, primitive.atomic_numbers.tolist()
    with _without_warnings():
        try:
            found = seekpath.get_path_orig_cell(crystal, symprec=SYMPREC)
        except (ValueError, RuntimeError, seekpath.SymmetryDetectionError) as error:
            raise StructureError(
                f"no standard path for this cell: {error}",
                code="NoBandPath",
                hint="check the structure",
            ) from error
    points = {_pretty(name): place for name, place in found["point_coords"].items()}
    if wanted is None:
        names = [(_pretty(a), _pretty(b)) for a, b in found["path"]]
    else:
        names = [pair for piece in wanted for pair in pairwise(piece)]
        if unknown := sorted({name for pair in names for name in pair} - set(points)):
            raise StructureError(
                f"the Brillouin zone of this crystal has no point {', '.join(unknown)}",
                code="UnknownBandPoint",
                hint=f"it has {', '.join(points)}",
            )
    return straight_path(cell, [(points[a], points[b]) for a, b in names], tuple(names))


def straight_path(
    cell: Float[ndarray, "3 3"],
    ends: list[tuple[list[float], list[float]]],
    labels: tuple[tuple[str, str], ...],
) -> BandPath:
    """Equally many points on every straight piece between two wave vectors."""
    reciprocal = 2.0 * np.pi * np.linalg.inv(cell).T
    share = np.linspace(0.0, 1.0, SEGMENT_POINTS)
    points, distances, total = [], [], 0.0
    for start, end in ends:
        step = np.array(end, dtype=float) - np.array(start, dtype=float)
        length = float(np.linalg.norm(step @ reciprocal))
        points.append(np.array(start, dtype=float) + share[:, None] * step)
        distances.append(total + share * length)
        total += length
    firsts = range(0, SEGMENT_POINTS * len(ends), SEGMENT_POINTS)
    return BandPath(
        q_points=np.concatenate(points),
        distances=np.concatenate(distances),
        segments=tuple((first, first + SEGMENT_POINTS - 1) for first in firsts),
        labels=labels,
    )


def symmetrized_force_constants(
    primitive: Structures, mesh: Mesh, raw: Float[ndarray, "cells dim dim"]
) -> Float[ndarray, "cells dim dim"]:
    """Phi projected by symfc: space group, exchange of atoms and translations."""
    phonon = _phonopy(primitive, mesh)
    phonon.force_constants = _to_phonopy(_places(phonon, primitive, mesh), raw)
    phonon.symmetrize_force_constants(use_symfc_projector=True, show_drift=False)
    return _from_phonopy(phonon, _places(phonon, primitive, mesh), mesh)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Force constants of a crystal as phonopy knows them, maybe with polar terms."""

    phonon: "Phonopy"
    fractional: Float[ndarray, "atoms 3"]
    polar: bool

    def dos(
        self, mesh: Mesh
    ) -> tuple[Float[ndarray, " frequencies"], Float[ndarray, " frequencies"]]:
        """Frequencies (THz) and states per THz and cell, by the tetrahedron method."""
        frequencies = self.phonon.run_mesh(mesh, is_gamma_center=True).frequencies
        span = float(frequencies.max() - frequencies.min())
        found = self.phonon.run_total_dos(freq_pitch=max(span, SMALLEST_SPAN) / DOS_POINTS)
        return np.array(found.frequency_points), np.array(found.dos)

    def matrices(
        self, q: Float[ndarray, "points 3"], directions: Float[ndarray, "points 3"] | None = None
    ) -> Complex[ndarray, "points dim dim"]:
        """D(q) in the lattice phase, eV/Å²/amu; at Gamma along a direction, if there are some."""
        found = self._evaluate(q)
        if self.polar and directions is not None:
            at_gamma = is_gamma(q)
            for direction in np.unique(directions[at_gamma], axis=0):
                own = at_gamma & (directions == direction).all(axis=1)
                found[own] = self._evaluate(np.zeros((1, 3)), direction)
        angle = 2j * np.pi * q @ self.fractional.T
        phase = np.repeat(np.exp(angle), 3, axis=1)
        return np.asarray(found * phase[:, :, None] * phase.conj()[:, None, :])

    def _evaluate(
        self, q: Float[ndarray, "points 3"], direction: Float[ndarray, "3"] | None = None
    ) -> Complex[ndarray, "points dim dim"]:
        """D(q) in the position phase."""
        found = self.phonon.run_qpoints(
            q, with_dynamical_matrices=True, nac_q_direction=direction
        ).dynamical_matrices
        assert found is not None
        return np.array(found)

    def write(self, directory: Path) -> list[str]:
        """`phonopy_params.yaml` and `FORCE_CONSTANTS`; returns their names."""
        from phonopy.file_IO import write_FORCE_CONSTANTS  # noqa: PLC0415

        yaml, constants = (directory / name for name in FILES)
        settings = {"force_constants": True, "force_sets": False, "displacements": False}
        self.phonon.save(str(yaml), settings=settings)
        p2s_map, found = self.phonon.primitive.p2s_map, self.phonon.force_constants
        assert found is not None
        write_FORCE_CONSTANTS(found, str(constants), p2s_map=p2s_map)
        return [str(yaml), str(constants)]


class FreeEnergyMinimum(NamedTuple):
    """By temperature (K), per cell: Å³, 1/K, GPa, eV, eV/K."""

    temperature: Float[ndarray, " temperatures"]
    volume: Float[ndarray, " temperatures"]
    expansion: Float[ndarray, " temperatures"]
    bulk_modulus_GPa: Float[ndarray, " temperatures"]
    gibbs: Float[ndarray, " temperatures"]
    heat_capacity: Float[ndarray, " temperatures"]


def minimized_free_energy(
    lattices: Sequence[Lattice],
    energies: Sequence[float],
    temperatures: Float[ndarray, " more"],
    mesh: Mesh,
) -> FreeEnergyMinimum:
    """Minimum of E(V) + F(V, T) over V, from Vinet fits, but for the last temperature.

    Temperatures whose fit fails are left out.

    Raises:
        StructureError: "NoFreeEnergyFit", at too many of them.
    """
    from phonopy import run_qha  # noqa: PLC0415

    with warnings.catch_warnings():
        # The caller looks itself whether the minimum is within the volumes, and what is missing.
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = run_qha(
                [one.phonon for one in lattices],
                temperatures,
                internal_energies=list(energies),
                mesh=[n + 1 - n % 2 for n in mesh],  # even ones would be shifted off Gamma
                eos="vinet",
                exclude_gamma_acoustic=True,
            )
        except RuntimeError as error:
            raise StructureError(
                "the free energy has no minimum that Vinet's form describes",
                code="NoFreeEnergyFit",
                hint="widen --range",
            ) from error
    return FreeEnergyMinimum(
        temperature=np.array(found.temperatures),
        volume=np.array(found.equilibrium_volumes),
        expansion=np.array(found.thermal_expansion),
        bulk_modulus_GPa=GPA_PER_EV_PER_A3 * np.array(found.bulk_moduli),
        gibbs=np.array(found.gibbs_free_energies),
        heat_capacity=np.array(found.heat_capacity_P.heat_capacities),
    )


def lattice_of(
    primitive: Structures,
    mesh: Mesh,
    force_constants: Float[ndarray, "cells dim dim"],
    born: str | None = None,
) -> Lattice:
    """A crystal with its force constants in phonopy.

    Raises:
        StructureError: "BadBornFile", if the text of the BORN file does not fit the crystal.
    """
    phonon = _phonopy(primitive, mesh)
    if born is not None:
        phonon.nac_params = polar_parameters(phonon.primitive, born)
    phonon.force_constants = _to_phonopy(_places(phonon, primitive, mesh), force_constants)
    return Lattice(phonon, _fractional(primitive), born is not None)


def polar_parameters(primitive: "Primitive", born: str) -> "NacParams":
    """Born charges and dielectric tensor from the text of a BORN file.

    Raises:
        StructureError: "BadBornFile", if it does not fit the crystal.
    """
    from phonopy.file_IO import parse_BORN_from_strings  # noqa: PLC0415

    try:
        found = parse_BORN_from_strings(born, primitive, symprec=SYMPREC)
    except (ValueError, IndexError, RuntimeError, AssertionError, TypeError) as error:
        raise StructureError(
            f"the Born charges do not fit the primitive cell: {error}",
            code="BadBornFile",
            field="born",
            hint="factor, dielectric tensor, then charges of the independent atoms, one a line",
        ) from error
    if found.get("factor") is None:
        found["factor"] = POLAR_FACTOR
    found.setdefault("method", "gonze")
    return found


def check_polar_terms(primitive: Structures, born: str | None) -> None:
    """Nothing, if the text of the BORN file, when there is one, fits the crystal.

    Raises:
        StructureError: "BadBornFile".
    """
    if born is not None:
        polar_parameters(_phonopy(primitive, (1, 1, 1)).primitive, born)


POLAR_FACTOR = 14.39965172592227
"""e²/(4 pi eps0) in eV·Å, as in phonopy."""


def _phonopy(primitive: Structures, mesh: Mesh) -> "Phonopy":
    from phonopy import Phonopy  # noqa: PLC0415  # 1 s with spglib and its yaml

    return Phonopy(
        _atoms(primitive), supercell_matrix=list(mesh), primitive_matrix="P", symprec=SYMPREC
    )


def _atoms(structures: Structures) -> "PhonopyAtoms":
    from phonopy.structure.atoms import PhonopyAtoms  # noqa: PLC0415

    cell = structures.cell[0].double().cpu().numpy()
    positions = structures.positions.double().cpu().numpy()
    return PhonopyAtoms(
        numbers=structures.atomic_numbers.tolist(),
        cell=cell,
        scaled_positions=positions @ np.linalg.inv(cell),
    )


def _fractional(primitive: Structures) -> Float[ndarray, "atoms 3"]:
    cell = primitive.cell[0].double().cpu().numpy()
    return np.asarray(primitive.positions.double().cpu().numpy() @ np.linalg.inv(cell))


def _places(
    phonon: "Phonopy", primitive: Structures, mesh: Mesh
) -> tuple[Int[ndarray, "atoms all"], Int[ndarray, " all"]]:
    """Cells (places in the mesh) from each primitive atom to all of the supercell; their kinds.

    Cells count from our primitive atoms; phonopy moves atoms into its own cells.
    """
    p2p_map, supercell = phonon.primitive.p2p_map, phonon.supercell
    first = np.array([p2p_map[k] for k in phonon.primitive.s2p_map])
    own = supercell.positions @ np.linalg.inv(phonon.primitive.cell)
    shift = np.rint(own - _fractional(primitive)[first]).astype(np.int64)
    apart = shift[None] - shift[phonon.primitive.p2s_map][:, None]
    return np.ravel_multi_index(tuple(np.moveaxis(np.mod(apart, mesh), -1, 0)), mesh), first


def _to_phonopy(
    places: tuple[Int[ndarray, "atoms all"], Int[ndarray, " all"]],
    constants: Float[ndarray, "cells dim dim"],
) -> Float[ndarray, "atoms all 3 3"]:
    place, first = places
    n_atoms = len(place)
    blocks = constants.reshape(-1, n_atoms, 3, n_atoms, 3).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(blocks[place, np.arange(n_atoms)[:, None], first])


def _from_phonopy(
    phonon: "Phonopy", places: tuple[Int[ndarray, "atoms all"], Int[ndarray, " all"]], mesh: Mesh
) -> Float[ndarray, "cells dim dim"]:
    place, first = places
    n_atoms, constants = len(place), np.array(phonon.force_constants)
    if len(constants) != n_atoms:
        constants = constants[phonon.primitive.p2s_map]
    blocks = np.empty((int(np.prod(mesh)), n_atoms, n_atoms, 3, 3))
    blocks[place, np.arange(n_atoms)[:, None], first] = constants
    return blocks.transpose(0, 1, 3, 2, 4).reshape(-1, 3 * n_atoms, 3 * n_atoms)


def _pretty(name: str) -> str:
    return "Γ" if name == "GAMMA" else name


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence old calls of spglib by seekpath, and its notes on cells between two types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
