"""Everything that fixes a training run, as frozen dataclasses.

Ranges are checked here, because Python callers and stored runs do not pass through `coset.config`.
Losses are in scaled units: energies and virials per atom and divided by the energy scale, forces
divided by the energy scale, direct quantities by their own scales.
"""

from dataclasses import dataclass, field
from typing import Literal

from coset.errors import ConfigError, check_choice, check_range
from coset.pet.hypers import PetHypers


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreShare:
    """One store of the training mixture; share: its part of the structures seen."""

    path: str
    share: float = 1.0

    def __post_init__(self) -> None:
        """Refuse shares that are not positive."""
        check_range("data.share", self.share, 1e-6, 1e6)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Stores for training and validation, and which records are left out.

    max_force: records with a larger force (eV/Å) are left out; max_energy: records further than
    this from the composition baseline (eV/atom); max_atoms: larger records. All are counted and
    listed.
    """

    train: tuple[StoreShare, ...]
    valid: tuple[str, ...] = ()
    max_force: float = 60.0
    max_energy: float = 15.0
    max_atoms: int = 400

    def __post_init__(self) -> None:
        """Refuse an empty mixture and empty ranges."""
        if not self.train:
            raise ConfigError("no training store given, expected at least one", field="data.train")
        check_range("data.max_force", self.max_force, 1e-3, 1e9)
        check_range("data.max_energy", self.max_energy, 1e-3, 1e9)
        check_range("data.max_atoms", self.max_atoms, 1, 1_000_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSettings:
    """How many structures one optimizer step sees, cut into micro-batches of equal cost.

    structures: mean number in a step; micro_batches: parts of a step, shared by the ranks
    (the number of ranks must divide it); window: steps that are planned and balanced together.
    """

    structures: int = 64
    micro_batches: int = 1
    window: int = 64

    def __post_init__(self) -> None:
        """Refuse empty batches."""
        check_range("batch.structures", self.structures, 1, 1_000_000)
        check_range("batch.micro_batches", self.micro_batches, 1, self.structures)
        check_range("batch.window", self.window, 1, 100_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """Decay on matrices alone, clipping by the global norm, averaged weights.

    name: `adamw`, or `muon`, which takes AdamW for all but the hidden matrices.
    """

    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 1e-3
    clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        """Refuse unknown names and factors outside their ranges."""
        check_choice("optimizer.name", self.name, ("adamw", "muon"))
        for beta in self.betas:
            check_range("optimizer.betas", beta, 0.0, 0.999999)
        check_range("optimizer.eps", self.eps, 0.0, 1.0)
        check_range("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)
        check_range("optimizer.clip", self.clip, 1e-9, 1e9)
        check_range("optimizer.ema", self.ema, 0.0, 0.999999999)


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One term of the loss: its weight and the Huber delta in scaled units."""

    weight: float = 0.0
    delta: float = 0.01

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        check_range("loss.weight", self.weight, 0.0, 1e9)
        check_range("loss.delta", self.delta, 1e-9, 1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """Terms of the loss; a term of weight 0 is not computed.

    forces, virial: of the energy head. hessian: force differences of displaced pairs over their
    distance. huber: `vector` takes the Huber function of the norm of an error in the forces, which
    a rotation leaves alone; `component` that of every component, as metatrain does.
    """

    energy: Term = field(default_factory=Term)
    forces: Term = field(default_factory=Term)
    virial: Term = field(default_factory=Term)
    hessian: Term = field(default_factory=Term)
    direct_forces: Term = field(default_factory=Term)
    direct_stress: Term = field(default_factory=Term)
    huber: Literal["vector", "component"] = "vector"

    def __post_init__(self) -> None:
        """Refuse a loss without terms."""
        check_choice("loss.huber", self.huber, ("vector", "component"))
        terms = (self.energy, self.forces, self.virial, self.direct_forces, self.direct_stress)
        if not any(term.weight for term in terms):
            raise ConfigError("every weight of the loss is 0", field="loss")

    def weights(self) -> dict[str, float]:
        """Weights of the terms that have one."""
        names = ("energy", "forces", "virial", "hessian", "direct_forces", "direct_stress")
        return {name: w for name in names if (w := getattr(self, name).weight)}

    @property
    def conservative(self) -> bool:
        """Whether a term needs the gradient of the energy."""
        return bool(self.forces.weight or self.virial.weight or self.hessian.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSettings:
    """A part of the run with its own loss, learning rate and precision.

    schedule: `cosine` to `final_lr`, or `wsd`: constant, then linear to `final_lr` over the last
    `decay` of the steps. warmup, decay: fractions of `steps`. precision: `float32`, or `bfloat16`
    for the products of the network (autocast). A stage begins with the
    averaged weights of the one before and a fresh optimizer; one that `continues` keeps raw
    weights, optimizer and average as they are.
    """

    name: str
    steps: int
    lr: float
    loss: LossSettings
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.02
    decay: float = 0.2
    final_lr: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    continues: bool = False

    def __post_init__(self) -> None:
        """Refuse empty stages and schedules that cannot be."""
        if not self.name or not self.name.replace("-", "").isalnum():
            raise ConfigError(f"stage.name = {self.name!r}, expected letters, digits and hyphens")
        check_range("stage.steps", self.steps, 1, 10**12)
        check_range("stage.lr", self.lr, 0.0, 10.0)
        check_range("stage.final_lr", self.final_lr, 0.0, self.lr)
        check_range("stage.warmup", self.warmup, 0.0, 1.0)
        check_range("stage.decay", self.decay, 0.0, 1.0)
        check_choice("stage.schedule", self.schedule, ("cosine", "wsd"))
        check_choice("stage.precision", self.precision, ("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Where the run lives, its seed, and how often it saves and validates.

    checkpoint_minutes: between saves; keep: checkpoints kept besides the last of every stage;
    valid_every: steps between validations (0: only at the end of a stage); valid_structures: how
    many records of every validation store are used (0: all).
    """

    directory: str
    seed: int = 0
    checkpoint_minutes: float = 5.0
    keep: int = 3
    log_every: int = 20
    valid_every: int = 1000
    valid_structures: int = 1000

    def __post_init__(self) -> None:
        """Refuse seeds and intervals that cannot be."""
        check_range("run.seed", self.seed, 0, 2**63 - 1)
        check_range("run.checkpoint_minutes", self.checkpoint_minutes, 0.0, 1e6)
        check_range("run.keep", self.keep, 1, 1000)
        check_range("run.log_every", self.log_every, 1, 10**9)
        check_range("run.valid_every", self.valid_every, 0, 10**12)
        check_range("run.valid_structures", self.valid_structures, 0, 10**12)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Words about the model being trained, for its manifest; nothing here changes a number."""

    name: str = "model"
    description: str = ""
    level_of_theory: str = ""
    training_data: str = ""
    license: str = ""
    citation: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """A whole run; start: a model to begin with, for its weights, baseline and scales."""

    data: DataSettings
    model: PetHypers
    stages: tuple[StageSettings, ...]
    run: RunSettings
    facts: ModelFacts = field(default_factory=ModelFacts)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    start: str = ""

    def __post_init__(self) -> None:
        """Refuse runs without stages, and losses without their heads."""
        if not self.stages:
            raise ConfigError("no stage given, expected at least one", field="stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages must have distinct names, not {names}", field="stage.name")
        for stage in self.stages:
            for quantity in ("direct_forces", "direct_stress"):
                term: Term = getattr(stage.loss, quantity)
                if term.weight and not self.model.targets_of(quantity):
                    raise ConfigError(
                        f"stage {stage.name} weighs {quantity}, but the model has no such target",
                        field=f"stage.loss.{quantity}",
                        hint=f"add {quantity} to model.targets",
                    )

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)
