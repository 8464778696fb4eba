"""What a relaxation is asked to do, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from coset.errors import ConfigError
from coset.structures import Properties, Structures
from coset.symmetry.adaptive import AUTO, TOLERANCE
from coset.symmetry.certificate import Certificate
from coset.symmetry.rules import LEVELS
from coset.workflows.optimizers import OPTIMIZERS
from coset.workflows.stability import Stability

CHOICES: dict[str, tuple[str | None, ...]] = {
    "cell": (None, "full", "fixed", "shape", "volume"),
    "symmetry": ("keep", "free"),
    "optimizer": tuple(OPTIMIZERS),
    "average": (None, *LEVELS, AUTO),
}

POSITIVE = (
    "force_tolerance",
    "stress_tolerance_GPa",
    "symprec",
    "max_step",
    "rotational_tolerance",
)

Status = Literal["converged", "not_converged", "rejected", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RelaxSettings:
    """What is relaxed, how far, and how.

    force_tolerance: eV/Å, on the longest force. stress_tolerance_GPa: on the largest component of
    stress + pressure. cell: `full`, `shape` (volume kept), `volume` (shape kept), `fixed`; None is
    `full` where periodic in 3D, else `fixed`. symprec: Å, to find the group. max_step: Å.
    optimizer: `lbfgs` or `fire`. average: a level of `coset.symmetry.rules`, chosen once for every
    structure; None is `project` with symmetry `keep` and `none` with `free`; `auto` is the smallest
    rule whose error of the energy is within rotational_tolerance (eV per atom) at the start.
    check_stability: look for a lower symmetry at the end of `keep` (`coset.workflows.stability`).
    """

    force_tolerance: float = 0.02
    stress_tolerance_GPa: float = 0.1
    max_steps: int = 500
    cell: Literal["full", "fixed", "shape", "volume"] | None = None
    pressure_GPa: float = 0.0
    symmetry: Literal["keep", "free"] = "keep"
    symprec: float = 1e-2
    max_step: float = 0.1
    optimizer: Literal["lbfgs", "fire"] = "lbfgs"
    average: str | None = None
    rotational_tolerance: float = TOLERANCE
    check_stability: bool = False

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        for name in POSITIVE:
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise ConfigError(f"{name} = {value}, expected a positive number", field=name)
        if self.max_steps < 0:
            raise ConfigError(f"max_steps = {self.max_steps}, expected 0 or more")
        if not abs(self.pressure_GPa) < float("inf"):
            raise ConfigError(f"pressure_GPa = {self.pressure_GPa}, expected a finite number")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(str(choice) for choice in choices)
                raise ConfigError(f"{name} = {value!r}, expected one of {known}", field=name)
        useless = {"keep": "none", "free": "project"}[self.symmetry]
        if self.average == useless:
            raise ConfigError(
                f"average = {useless!r} with symmetry = {self.symmetry!r}: 'keep' always projects, "
                "'free' has no group to project on",
                field="average",
            )
        if self.check_stability and self.symmetry != "keep":
            raise ConfigError(
                "check_stability with symmetry = 'free': no group is kept that could be broken",
                field="check_stability",
            )
        if self.pressure_GPa != 0.0 and self.cell in ("fixed", "shape"):
            raise ConfigError(
                f"pressure_GPa = {self.pressure_GPa} does nothing with cell = {self.cell!r}, which "
                "keeps the volume",
                field="pressure_GPa",
            )

    @property
    def level(self) -> str:
        """The level of averaging that applies."""
        return self.average or {"keep": "project", "free": "none"}[self.symmetry]


TIGHT = RelaxSettings(force_tolerance=1e-4, stress_tolerance_GPa=0.01)
"""Before phonons and elastic constants; use a float64 potential."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relaxation:
    """Outcome for one structure; `structures` is the last good geometry (a batch of one).

    energy: eV. max_force: eV/Å. max_stress_GPa: largest component of stress + pressure, NaN where
    undefined. Space groups: before at `symprec`, after at 1e-5 Å. group_kept: name of the space,
    layer or point group in which it relaxed. rmsd: Å, without the strain.
    stability: of a converged structure, if it was asked for.
    """

    status: Status
    code: str
    reason: str
    structures: Structures | None
    properties: Properties | None = None
    n_steps: int = 0
    n_evaluations: int = 0
    max_force: float = float("nan")
    max_stress_GPa: float = float("nan")
    pressure_GPa: float = float("nan")
    space_group_before: int | None = None
    space_group_after: int | None = None
    group_kept: str = ""
    rmsd: float = float("nan")
    certificate: Certificate | None = None
    stability: Stability | None = None
    warnings: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """Total energy in eV, NaN if nothing was evaluated."""
        if self.properties is None or self.properties.energy is None:
            return float("nan")
        return float(self.properties.energy[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What an observer sees after each batched evaluation."""

    step: int
    n_done: int
    systems: tuple[int, ...]
    structures: Structures
    properties: Properties
    max_force: Float[Tensor, " active"]
    max_stress_GPa: Float[Tensor, " active"]

    @property
    def note(self) -> str:
        """For a progress bar."""
        return f"step {self.step}, {float(self.max_force.max()):.3g} eV/Å"


Observer = Callable[[Progress], bool]
"""Returns True to stop early: what has not converged keeps its geometry, code `Interrupted`."""
