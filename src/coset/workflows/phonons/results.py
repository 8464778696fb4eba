"""What a phonon calculation is asked to do, and what it returns."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from numpy import ndarray

from coset.errors import ConfigError, check_choice, check_range
from coset.structures import Structures
from coset.symmetry.rules import LEVELS
from coset.workflows.phonons.by_phonopy import BandPath, Lattice, Pieces
from coset.workflows.phonons.descent import Instability, Minimum
from coset.workflows.phonons.mesh import Mesh
from coset.workflows.phonons.thermal import Thermal
from coset.workflows.phonons.verdict import Verdict
from coset.workflows.relaxation import Relaxation

METHODS = ("exact", "displacements")

Status = Literal["ok", "not_converged", "rejected", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhononSettings:
    """How phonons are computed.

    method: `exact` (derivatives of the model) or `displacements` (any potential). supercell:
    multiples of the primitive cell that force constants reach, None to enlarge it from `min_edge`
    (Å) until the interpolation error is below `interpolation_tolerance_THz`, at most to `max_edge`;
    with displacements `max_edge` is not used. mesh: of DOS, thermal properties and verdict; None is
    `spacing` (Å^-1, with 2 pi). path: points that bands run through, None for the standard path;
    the verdict looks at them too. relax: to 1e-4 eV/Å and 0.01 GPa first. average: a level of
    `coset.symmetry.rules`, in `frames` independent frames. amplitude: Å, of displacements, and
    twice that. temperatures: K. born: text of a BORN file of phonopy. follow: descend from
    what is unstable into subgroups, at level `standard` or that of `average` if higher.
    double: exact derivatives on the mesh in the precision of the model instead of float32; those
    that test the interpolation always are. quick: exact derivatives at one wave vector and atom of
    each orbit in the supercell of `min_edge`, the rest by symmetry: the error of a frame is then
    that of one orientation, and the interpolation is not tested.
    """

    method: Literal["exact", "displacements"] = "exact"
    supercell: Mesh | None = None
    mesh: Mesh | None = None
    path: Pieces | None = None
    relax: bool = True
    symprec: float = 1e-2
    average: str = "project"
    frames: int = 6
    seed: int = 0
    min_edge: float = 14.0
    max_edge: float = 24.0
    interpolation_tolerance_THz: float = 0.02
    spacing: float = 0.05
    amplitude: float = 0.01
    temperatures: tuple[float, ...] = tuple(100.0 * k for k in range(11))
    born: str | None = None
    follow: bool = False
    double: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check_choice("method", self.method, METHODS)
        check_choice("average", self.average, tuple(LEVELS))
        check_range("frames", self.frames, 1, 1000)
        for name in ("quick", "double"):
            if getattr(self, name) and self.method != "exact":
                raise ConfigError(
                    f"{name} is for exact derivatives, method is {self.method!r}", field=name
                )
        for name in ("symprec", "min_edge", "max_edge", "spacing", "amplitude"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}, expected a positive number")
        for name in ("supercell", "mesh"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or min(value) < 1):
                raise ConfigError(f"{name} = {value}, expected three positive integers", field=name)
        if not self.temperatures or not all(0.0 <= t < float("inf") for t in self.temperatures):
            raise ConfigError(f"temperatures = {self.temperatures} K, expected some of 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bands:
    """Frequencies along a path, imaginary ones as negative; standard errors, None if unknown."""

    path: BandPath
    frequency_THz: Float[ndarray, "points branches"]
    error_THz: Float[ndarray, "points branches"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dos:
    """States per THz and primitive cell."""

    frequency_THz: Float[ndarray, " frequencies"]
    states: Float[ndarray, " frequencies"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhononResult:
    """Everything found for one structure.

    primitive: the cell that wave vectors refer to. energy: eV per primitive cell. supercell: range
    of the force constants.
    interpolation_error_THz: largest difference from direct frequencies at eight wave vectors off
    the mesh, in one frame before projection, None if not tested. gamma_residual_THz: of the
    translations. lattice: writes the files of phonopy. instabilities, minima: of an unstable
    crystal that was followed.
    """

    primitive: Structures
    energy: float
    space_group: int | None
    supercell: Mesh
    mesh: Mesh
    bands: Bands
    dos: Dos
    thermal: Thermal
    verdict: Verdict
    gamma_residual_THz: float
    lattice: Lattice
    interpolation_error_THz: float | None = None
    instabilities: tuple[Instability, ...] = ()
    minima: tuple[Minimum, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Phonons:
    """Outcome for one structure; `result` is None if it was rejected or failed."""

    status: Status
    code: str = ""
    reason: str = ""
    warnings: tuple[str, ...] = ()
    relaxation: Relaxation | None = None
    result: PhononResult | None = None
