"""From a model name or file to a potential that runs."""

from dataclasses import dataclass, replace

import torch

from coset.catalog import DEFAULT_MODEL
from coset.catalog import load_model as read_model
from coset.checkpoint import Checkpoint
from coset.edge_model import Outputs
from coset.errors import ConfigError
from coset.pet.hypers import MAX_ATOMIC_NUMBER
from coset.pet.model import Pet
from coset.potential import ModelPotential, pick_target
from coset.repulsion import zbl_reach

DTYPES = {
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.float64, torch.float32),
    "float32": (torch.float32, torch.float32),
}
"""Type of the geometry and of the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """How a model is used.

    target: energy head, needed if the model has several. dtype: `mixed` is float64 geometry with a
    float32 network. device: `auto`, `cpu`, `cuda` or `cuda:n`. forces: `conservative` (gradient) or
    `direct` (heads). memory: bytes of one batch.
    """

    target: str | None = None
    dtype: str = "mixed"
    device: str = "auto"
    forces: str = "conservative"
    ignore_charge: bool = False
    memory: float = 2e9


def load_model(name: str = DEFAULT_MODEL, settings: LoadSettings | None = None) -> ModelPotential:
    """The potential of a model directory or file, a foreign checkpoint, or a catalog name.

    Without a name: the model that comes with coset.

    Raises:
        CheckpointError: the file is damaged, unsafe, newer, or of another kind.
        ConfigError: the target, dtype or device cannot be had.
    """
    return potential_of(read_model(name), settings or LoadSettings())


def potential_of(checkpoint: Checkpoint, settings: LoadSettings) -> ModelPotential:
    """Bind the weights of a checkpoint to one energy target, on a device and in a precision."""
    if settings.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise ConfigError(f"dtype = {settings.dtype!r}, expected one of {known}", field="dtype")
    hypers, device = checkpoint.hypers, pick_device(settings.device)
    target = pick_target(hypers.targets_of("energy"), settings.target)
    geometry_dtype, network_dtype = DTYPES[settings.dtype]
    baseline = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    for number, energy in checkpoint.baseline.get(target, {}).items():
        baseline[number] = energy
    direct = settings.forces == "direct"
    conditioning = hypers.conditioning
    return ModelPotential(
        model=network_of(checkpoint, network_dtype).to(device),
        cutoff=max(hypers.cutoff.cutoff, hypers.zbl * zbl_reach(hypers.atomic_types)),
        elements=frozenset(hypers.atomic_types),
        baseline=baseline.to(device),
        name=checkpoint.provenance.name,
        level_of_theory=checkpoint.level_of_theory(target),
        outputs=_outputs(checkpoint, target, direct=direct),
        dtype=geometry_dtype,
        forces=not direct,
        conditioned=None
        if conditioning is None
        else (conditioning.max_charge, conditioning.max_spin_multiplicity),
        ignore_charge=settings.ignore_charge,
        memory=settings.memory,
    )


def network_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Pet:
    """The network with its weights, frozen, on the CPU."""
    network = Pet(checkpoint.hypers, checkpoint.scales).to(dtype)
    network.load_state_dict(dict(checkpoint.weights))
    return network.requires_grad_(False).eval()


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one; anything else must exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}, expected auto, cpu, cuda or cuda:n") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= available:
        raise ConfigError(
            f"device = {name!r} is not there: {torch.cuda.device_count()} CUDA devices found",
            field="device",
            hint="use --device cpu",
        )
    return device


def _outputs(checkpoint: Checkpoint, target: str, *, direct: bool) -> Outputs:
    """The heads to compute; direct heads of the same variant as the energy."""
    if not direct:
        return Outputs(energy=(target,))
    forces = _of_variant(checkpoint.hypers.targets_of("direct_forces"), target)
    if forces is None:
        raise ConfigError(
            f"model {checkpoint.provenance.name} has no direct forces for target {target!r}",
            code="NoDirectForces",
            field="forces",
            hint="use conservative forces",
        )
    stress = _of_variant(checkpoint.hypers.targets_of("direct_stress"), target)
    return Outputs(energy=(target,), direct_forces=forces, direct_stress=stress)


def _of_variant(names: tuple[str, ...], target: str) -> str | None:
    """The head with the variant of the energy target, or the only one without a variant."""
    variant = target.partition("/")[2]
    for name in names:
        if name.partition("/")[2] == variant:
            return name
    plain = [name for name in names if "/" not in name]
    return plain[0] if plain else None


def in_half_precision(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with its weights rounded to float16 (relative errors of 5e-4)."""
    provenance = checkpoint.provenance
    return replace(
        checkpoint,
        weights={name: weight.half() for name, weight in checkpoint.weights.items()},
        provenance=replace(provenance, conversions=(*provenance.conversions, "float16 weights")),
    )


def with_converged_cutoff(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights with the exact root of the adaptive cutoff in place of `solver10`.

    Energies change only where ten solver steps had not converged; there forces become the
    derivative of the energy. The change is recorded in the provenance.
    """
    cutoff = checkpoint.hypers.cutoff
    if cutoff.adaptive != "solver10":
        raise ConfigError(
            f"adaptive cutoff {cutoff.adaptive!r} cannot be rewritten, only 'solver10' can",
            field="cutoff.adaptive",
        )
    provenance = checkpoint.provenance
    return replace(
        checkpoint,
        hypers=replace(checkpoint.hypers, cutoff=replace(cutoff, adaptive="converged")),
        provenance=replace(
            provenance, conversions=(*provenance.conversions, "solver10 -> converged")
        ),
    )
