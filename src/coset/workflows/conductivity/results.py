"""What a calculation of thermal conductivity is asked to do, and what it returns."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float, Int
from numpy import ndarray

from coset.errors import ConfigError, check_choice, check_range
from coset.structures import Structures
from coset.symmetry.rules import LEVELS
from coset.workflows.phonons.mesh import Mesh
from coset.workflows.relaxation import TIGHT, Relaxation, RelaxSettings

if TYPE_CHECKING:
    from coset.workflows.conductivity.by_phono3py import Anharmonic

METHODS = ("rta", "lbte", "wigner")
ROUTES = ("displacements", "exact")
PROJECTING = tuple(name for name, level in LEVELS.items() if level.projects)
POSITIVE = ("symprec", "min_edge", "min_edge_fc2", "spacing", "amplitude")

Status = Literal["ok", "not_converged", "rejected", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConductivitySettings:
    """How thermal conductivity is computed.

    method: `rta`, relaxation times; `lbte`, the linearized Boltzmann equation; `wigner`, relaxation
    times and coherences between branches. derivatives: third ones from forces of supercells with
    one or two displaced atoms, or from exact Hessians with one. supercell, supercell_fc2: multiples
    of the input cell; None is the smallest of the conventional cell with edges of `min_edge`,
    `min_edge_fc2` (Å): 64 atoms for MgO in third order, the supercell of phononDB. mesh: of the
    primitive cell, None is `spacing` (Å^-1, with 2 pi). relaxation: None keeps the structure.
    average: a level of `coset.symmetry.rules` that projects, in `frames` independent frames, whose
    scatter is the error. amplitude: Å, of displacements. isotopes: scattering by natural isotopes.
    boundary_um: free path between walls in micrometers.
    allow_imaginary: conductivity in spite of imaginary modes, which are left out. born: text of a
    BORN file of phonopy, for polar terms.
    """

    method: Literal["rta", "lbte", "wigner"] = "wigner"
    derivatives: Literal["displacements", "exact"] = "displacements"
    temperatures: tuple[float, ...] = (300.0,)
    supercell: Mesh | None = None
    supercell_fc2: Mesh | None = None
    mesh: Mesh | None = None
    min_edge: float = 8.0
    min_edge_fc2: float = 14.0
    spacing: float = 0.13
    relaxation: RelaxSettings | None = TIGHT
    symprec: float = 1e-2
    average: str = "project"
    frames: int = 3
    amplitude: float = 0.01
    isotopes: bool = True
    boundary_um: float | None = None
    allow_imaginary: bool = False
    born: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check_choice("method", self.method, METHODS)
        check_choice("derivatives", self.derivatives, ROUTES)
        check_choice("average", self.average, PROJECTING)
        check_range("frames", self.frames, 1, 1000)
        for name in POSITIVE:
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}, expected a positive number")
        for name in ("supercell", "supercell_fc2", "mesh"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or min(value) < 1):
                raise ConfigError(f"{name} = {value}, expected three positive integers", field=name)
        if not self.temperatures or not all(0.0 < t < float("inf") for t in self.temperatures):
            raise ConfigError(f"temperatures = {self.temperatures} K, expected positive numbers")
        self.tight()

    def tight(self) -> RelaxSettings | None:
        """How the crystal is relaxed first."""
        if self.relaxation is None:
            return None
        return replace(self.relaxation, symprec=self.symprec, average=self.average)


PHONONDB_V1 = ConductivitySettings(
    method="wigner",
    derivatives="displacements",
    temperatures=(300.0,),
    relaxation=replace(TIGHT, optimizer="fire", max_steps=300),
    symprec=1e-2,
    amplitude=0.03,
    isotopes=True,
    boundary_um=1e6,
    frames=1,
)
"""Protocol `phonondb-v1` of the benchmark kappa-103; each material brings supercells and mesh.

One frame, as all others have run it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Modes:
    """Modes at the irreducible wave vectors of the mesh; `weights` of them stand for each.

    mean_free_path: Å, speed times lifetime, both of the relaxation-time approximation, at each
    temperature. share: of a mode and its star in the trace of kappa / 3 (W/mK); a coherence is
    split between its branches by their heat capacities, as in the reference of `kappa-103`. With
    method `lbte` of the relaxation times.
    """

    q_points: Float[ndarray, "points 3"]
    weights: Int[ndarray, " points"]
    frequency_THz: Float[ndarray, "points branches"]
    linewidth_THz: Float[ndarray, "temperatures points branches"]
    mean_free_path: Float[ndarray, "temperatures points branches"]
    share: Float[ndarray, "temperatures points branches"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kappa:
    """Thermal conductivity in W/mK, in the axes of the input.

    rta: populations with relaxation times. coherences: what tunneling between branches adds, for
    method `wigner`. Degenerate branches are shared between these two by their basis, so that `rta`
    differs a little from that of the other methods. lbte: the full solution, for method `lbte`.
    """

    temperatures: Float[ndarray, " temperatures"]
    rta: Float[ndarray, "temperatures 3 3"]
    coherences: Float[ndarray, "temperatures 3 3"] | None
    lbte: Float[ndarray, "temperatures 3 3"] | None
    modes: Modes

    @property
    def by_method(self) -> dict[str, Float[ndarray, "temperatures 3 3"]]:
        """Every kappa that is known, by the method that gives it."""
        found = {"rta": self.rta}
        if self.coherences is not None:
            found["wigner"] = self.rta + self.coherences
        if self.lbte is not None:
            found["lbte"] = self.lbte
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ConductivityResult:
    """Everything found for one structure.

    kappa: None where imaginary modes forbid it. error: standard errors from the scatter of the
    frames, noise_share: part of the resistance 1/kappa that this scatter causes, which more frames
    or a higher level make smaller; both None for one frame. supercell, supercell_fc2: rows in units
    of the primitive cell. lowest_THz: lowest frequency on the mesh without translations, imaginary
    as negative. residual_fc3: largest component (eV/Å³) that symmetry took from exact third
    derivatives, None with displacements. n_evaluations: of supercells, Hessians counted once.
    anharmonic: writes the files of phono3py.
    """

    primitive: Structures
    space_group: int | None
    supercell: Int[ndarray, "3 3"]
    supercell_fc2: Int[ndarray, "3 3"]
    mesh: Mesh
    method: str
    lowest_THz: float
    n_imaginary: int
    n_evaluations: int
    anharmonic: "Anharmonic"
    kappa: Kappa | None = None
    error: Float[ndarray, "temperatures 3 3"] | None = None
    noise_share: Float[ndarray, " temperatures"] | None = None
    residual_fc3: float | None = None

    @property
    def value(self) -> Float[ndarray, "temperatures 3 3"] | None:
        """Kappa of the method that was asked for."""
        return None if self.kappa is None else self.kappa.by_method[self.method]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conductivity:
    """Outcome for one structure; `result` is None if it was rejected or failed."""

    status: Status
    code: str = ""
    reason: str = ""
    warnings: tuple[str, ...] = ()
    relaxation: Relaxation | None = None
    result: ConductivityResult | None = None
