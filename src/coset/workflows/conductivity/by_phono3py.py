"""What phono3py and symfc do for us: displacements, force constants, scattering, files.

The only file that imports phono3py, an optional package.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from coset.errors import MissingExtraError, StructureError
from coset.structures import Structures, make_structure
from coset.units import EV_PER_K, EV_PER_THZ
from coset.workflows.conductivity.results import Kappa, Modes
from coset.workflows.conductivity.three_phonons import ThreePhonons
from coset.workflows.observers import Step
from coset.workflows.phonons.by_phonopy import polar_parameters
from coset.workflows.phonons.mesh import Mesh

if TYPE_CHECKING:
    from phono3py import Phono3py
    from phono3py.phonon3.interaction import Interaction
    from phonopy.structure.atoms import PhonopyAtoms

FILES = ("phono3py_params.yaml", "fc2.hdf5", "fc3.hdf5")
SYMPREC = 1e-5
NOISE_THz = 0.01  # of the translations at Gamma
STRENGTH_BYTES = 4 * 2**30  # of interactions and their weights that one wave vector may take
FULL = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])  # xx yy zz yz xz xy
TWO_PI = 2.0 * np.pi
CALCULATORS = {"rta": "std-rta", "wigner": "SMM19-rta", "lbte": "std-lbte"}


def require_phono3py() -> None:
    """Nothing, if phono3py can be imported.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import phono3py  # noqa: F401, PLC0415
    except ImportError as error:
        raise MissingExtraError(
            "thermal conductivity needs phono3py, which is not installed",
            hint="pip install coset[conductivity]",
        ) from error


def conventional_matrix(primitive: Structures) -> Int[ndarray, "3 3"]:
    """Rows of the conventional cell in units of the primitive one."""
    from phonopy.structure.symmetry import Symmetry  # noqa: PLC0415  # slow to import

    found = Symmetry(_atoms(primitive), symprec=SYMPREC).dataset.transformation_matrix
    return np.asarray(np.rint(np.linalg.inv(found).T).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Anharmonic:
    """Force constants of second and third order of a crystal, and what follows from them."""

    phono3py: "Phono3py"

    @property
    def supercell(self) -> Structures:
        """That of the third order."""
        return _structures(self.phono3py.supercell)

    @property
    def supercell_fc2(self) -> Structures:
        """That of the second order."""
        return _structures(self.phono3py.phonon_supercell)

    @property
    def movable(self) -> tuple[list[int], list[int]]:
        """Atoms of the first primitive cell in the supercells of third and second order."""
        return (
            self.phono3py.primitive.p2s_map.tolist(),
            self.phono3py.phonon_primitive.p2s_map.tolist(),
        )

    def displacements(self, amplitude: float) -> Float[ndarray, "cells atoms 3"]:
        """All single and pair displacements, each with its opposite, that symmetry asks for."""
        self.phono3py.generate_displacements(distance=amplitude, is_plusminus=True)
        # `displacements` of phono3py would leave out the first atom of every pair.
        perfect = self.phono3py.supercell.scaled_positions
        cells = self.phono3py.supercells_with_displacements
        moved = np.array([one.scaled_positions for one in cells if one is not None]) - perfect
        return np.asarray((moved - np.rint(moved)) @ self.phono3py.supercell.cell)

    def third_from_forces(self, forces: Float[ndarray, "cells atoms 3"]) -> ndarray:
        """Force constants with all symmetries from forces at `displacements`.

        Differences, then the projection: a fit of all symmetries to all forces at once costs three
        to sixty times more and takes up more of what a potential breaks.
        """
        self.phono3py.forces = forces
        self.phono3py.produce_fc3()
        return self.third_symmetrized(np.array(self.phono3py.fc3))

    def third_symmetrized(self, raw: ndarray) -> ndarray:
        """Force constants projected on space group, permutations and the sum rule."""
        self.phono3py.fc3 = raw
        with _basis_exists():
            self.phono3py.symmetrize_fc3(use_symfc_projector=True)
        return np.array(self.phono3py.fc3)

    def second_from_forces(
        self,
        displacements: Float[ndarray, "cells atoms 3"],
        forces: Float[ndarray, "cells atoms 3"],
    ) -> ndarray:
        """Force constants with all symmetries from forces at any displacements."""
        self.phono3py.phonon_dataset = {"displacements": displacements, "forces": forces}
        self.phono3py.produce_fc2(fc_calculator="symfc")
        assert self.phono3py.fc2 is not None
        return np.array(self.phono3py.fc2)

    def second_symmetrized(self, raw: ndarray) -> ndarray:
        """Force constants projected on space group, permutations and the sum rule."""
        self.phono3py.fc2 = raw
        self.phono3py.symmetrize_fc2(use_symfc_projector=True)
        return np.array(self.phono3py.fc2)

    def places_fc2(self, own: Structures) -> tuple[Int[ndarray, "atoms 3"], Int[ndarray, " atoms"]]:
        """Cell S, and the primitive atom in it, of every atom of the second order.

        As the atoms of our `own` primitive cell lie: phono3py may have wrapped them.
        """
        primitive, supercell = self.phono3py.phonon_primitive, self.phono3py.phonon_supercell
        first = np.array([primitive.p2p_map[k] for k in primitive.s2p_map])
        inverse = np.linalg.inv(own.cell[0].double().cpu().numpy())
        home = own.positions.double().cpu().numpy() @ inverse
        return np.rint(supercell.positions @ inverse - home[first]).astype(np.int64), first

    def wave_vectors_fc2(self) -> Float[ndarray, "points 3"]:
        """All fractional wave vectors that fit into the supercell of the second order."""
        from phonopy.harmonic.dynmat_to_fc import get_commensurate_points  # noqa: PLC0415

        return np.array(get_commensurate_points(self.phono3py.phonon_supercell_matrix))

    def set_force_constants(self, second: ndarray, third: ndarray) -> None:
        """Take these."""
        self.phono3py.fc2, self.phono3py.fc3 = second, third

    def frequencies(self, mesh: Mesh) -> tuple[float, int]:
        """Lowest frequency (THz) without translations, and how many are imaginary.

        The three smallest at Gamma count as imaginary below -0.01 THz, all others below 0.
        """
        self.phono3py.mesh_numbers = list(mesh)
        self.phono3py.init_phph_interaction()
        self.phono3py.run_phonon_solver()
        found, _, addresses = self.phono3py.get_phonon_data()
        gamma = int(np.flatnonzero((addresses == 0).all(axis=1))[0])
        translations = np.argsort(np.abs(found[gamma]))[:3]
        others = np.array(found)
        others[gamma, translations] = np.inf
        moved = int((found[gamma, translations] < -NOISE_THz).sum())
        return float(others.min()), int((others < 0.0).sum()) + moved

    def kappa(
        self,
        mesh: Mesh,
        temperatures: Sequence[float],
        *,
        isotopes: bool,
        boundary_um: float | None,
        method: str,
        step: Step = lambda note: None,
    ) -> Kappa:
        """Conductivity on a mesh; `lbte` needs more memory than the others."""
        from phono3py.conductivity.factory import conductivity_calculator  # noqa: PLC0415

        self.phono3py.mesh_numbers = list(mesh)
        self.phono3py.init_phph_interaction()
        interaction = self.phono3py.phph_interaction
        interaction.run_phonon_solver()
        fast = _fits(interaction)
        if fast:
            _take_matrix_products(interaction)
        # What `run_thermal_conductivity` does, which says nothing before it has ended.
        found: Any = conductivity_calculator(
            interaction,
            np.array(temperatures, dtype=np.float64),
            [None],
            method=CALCULATORS[method],
            is_full_pp=fast,
            is_isotope=isotopes,
            boundary_mfp=boundary_um,
        )
        where = f"conductivity, mesh {'x'.join(map(str, mesh))}, wave vector"
        count = len(found.grid_points)
        step(f"{where} 1 of {count}")
        found.run(lambda done: step(f"{where} {min(done + 2, count)} of {count}"))
        populations = {"rta": "kappa", "lbte": "kappa_RTA", "wigner": "kappa_intra"}[method]
        return Kappa(
            temperatures=np.array(temperatures),
            rta=_tensor(getattr(found, populations)),
            coherences=_tensor(found.kappa_inter) if method == "wigner" else None,
            lbte=_tensor(found.kappa) if method == "lbte" else None,
            modes=_modes(found, method, boundary_um),
        )

    def write(self, folder: Path) -> None:
        """The files that `phono3py.load` reads."""
        from phono3py.file_IO import write_fc2_to_hdf5, write_fc3_to_hdf5  # noqa: PLC0415

        self.phono3py.save(
            folder / FILES[0],
            settings={"force_sets": False, "displacements": False, "force_constants": False},
        )
        second, third = self.phono3py.fc2, self.phono3py.fc3
        assert second is not None
        assert third is not None
        third_map, second_map = self.movable
        write_fc2_to_hdf5(second, filename=str(folder / FILES[1]), p2s_map=np.array(second_map))
        write_fc3_to_hdf5(third, filename=str(folder / FILES[2]), p2s_map=np.array(third_map))


def anharmonic(
    primitive: Structures,
    supercell: Int[ndarray, "3 3"],
    supercell_fc2: Int[ndarray, "3 3"],
    born: str | None = None,
) -> Anharmonic:
    """A crystal without force constants; supercells in units of its primitive cell.

    born: text of a BORN file, for polar terms.

    Raises:
        StructureError: "BadBornFile".
    """
    from phono3py import Phono3py  # noqa: PLC0415  # optional

    found = Phono3py(
        _atoms(primitive),
        supercell_matrix=supercell.T,  # there vectors are columns
        phonon_supercell_matrix=supercell_fc2.T,
        primitive_matrix="P",
        symprec=SYMPREC,
    )
    if born is not None:
        found.nac_params = polar_parameters(found.phonon_primitive, born)
    return Anharmonic(found)


def _fits(interaction: "Interaction") -> bool:
    """Can strengths and weights of all triplets of one wave vector be in memory at once?"""
    branches = 3 * len(interaction.primitive)
    return 3 * 8 * int(np.prod(interaction.mesh_numbers)) * branches**3 < STRENGTH_BYTES


def _take_matrix_products(interaction: Any) -> None:  # noqa: ANN401  # its `run` is replaced
    """Strengths of interaction from `ThreePhonons`: the same, a quarter of the time."""
    primitive, phonons, grid = interaction.primitive, interaction.phonons, interaction.bz_grid
    third = interaction.fc3
    if len(third) != len(primitive):
        third = third[primitive.p2s_map]
    shortest, counts_and_starts = primitive.get_smallest_vectors()
    elements = ThreePhonons.build(
        third,
        interaction.all_shortest,
        np.array([primitive.p2p_map[k] for k in primitive.s2p_map]),
        np.array(primitive.masses),
        shortest,
        counts_and_starts,
        grid.addresses @ grid.QDinv.T,
        primitive.scaled_positions,
    )
    frequencies = torch.from_numpy(phonons.frequencies)
    inverse = torch.where(frequencies > interaction.cutoff_frequency, 1.0 / frequencies, 0.0)
    states = torch.from_numpy(phonons.eigenvectors)

    def run(g_zero: Any = None) -> None:  # noqa: ANN401
        triplets = torch.from_numpy(interaction.get_triplets_at_q()[0])
        strength = elements.squared(triplets, states) * interaction.unit_conversion_factor
        one, two, three = inverse[triplets].unbind(dim=1)
        strength *= one[:, :, None, None] * two[:, None, :, None] * three[:, None, None, :]
        interaction.set_interaction_strength(strength.numpy(), g_zero)

    interaction.run = run


@contextmanager
def _basis_exists() -> Iterator[None]:
    """An error with a reason where symmetry leaves no third order, which symfc only asserts."""
    try:
        yield
    except AssertionError as error:
        raise StructureError(
            "symmetry makes all force constants of third order zero in this supercell",
            code="SupercellTooSmall",
            field="supercell",
            hint="take a larger one",
        ) from error


def _modes(found: Any, method: str, boundary_um: float | None) -> Modes:  # noqa: ANN401
    """Modes from a finished calculation; rates that phono3py gives in THz of its 2 gamma."""
    grid = found.grid_points
    frequency = (
        found.frequencies[grid] if len(found.frequencies) != len(grid) else found.frequencies
    )
    speed = np.linalg.norm(found.group_velocities, axis=-1)
    gamma = np.array(found.gamma[0])
    if found.gamma_isotope is not None:
        gamma = gamma + found.gamma_isotope[0]
    if boundary_um is not None:
        gamma = gamma + speed / (boundary_um * 1e4) / (2.0 * TWO_PI)
    rate = 2.0 * TWO_PI * gamma
    path = np.divide(speed, rate, out=np.zeros_like(rate), where=rate > 0.0)
    if method == "wigner":
        split = _heat_capacity_split(np.array(frequency), np.array(found.temperatures))
        own = 2.0 * np.einsum("tqij,tqija->tqia", split, found.mode_kappa_matrix[0])
    else:
        own = (found.mode_kappa_RTA if method == "lbte" else found.mode_kappa)[0]
    return Modes(
        q_points=np.array(found.qpoints),
        weights=np.array(found.grid_weights),
        frequency_THz=np.array(frequency),
        linewidth_THz=2.0 * gamma,
        mean_free_path=path,
        share=own[..., :3].sum(axis=-1) / 3.0 / found.grid_weights.sum(),
    )


def _heat_capacity_split(
    frequency: Float[ndarray, "points branches"], temperatures: Float[ndarray, " temperatures"]
) -> Float[ndarray, "temperatures points branches branches"]:
    """c_i/(c_i + c_j): the part of a coherence that is counted to the first branch."""
    energy = EV_PER_THZ * np.maximum(frequency, 1e-6)
    ratio = energy / (2.0 * EV_PER_K * temperatures[:, None, None])
    capacity = (ratio / np.sinh(np.minimum(ratio, 300.0))) ** 2
    total = capacity[..., :, None] + capacity[..., None, :]
    return np.asarray(
        np.divide(capacity[..., :, None], total, out=np.full_like(total, 0.5), where=total > 0.0)
    )


def _tensor(voigt: Float[ndarray, "1 temperatures 6"]) -> Float[ndarray, "temperatures 3 3"]:
    return np.asarray(np.array(voigt)[0][:, FULL])


def _atoms(structures: Structures) -> "PhonopyAtoms":
    from phonopy.structure.atoms import PhonopyAtoms  # noqa: PLC0415

    cell = structures.cell[0].double().cpu().numpy()
    positions = structures.positions.double().cpu().numpy()
    return PhonopyAtoms(
        numbers=structures.atomic_numbers.tolist(),
        cell=cell,
        scaled_positions=positions @ np.linalg.inv(cell),
    )


def _structures(atoms: "PhonopyAtoms") -> Structures:
    return make_structure(
        torch.from_numpy(np.array(atoms.positions)),
        torch.from_numpy(np.array(atoms.numbers, dtype=np.int64)),
        cell=torch.from_numpy(np.array(atoms.cell)),
        pbc=(True, True, True),
    )
