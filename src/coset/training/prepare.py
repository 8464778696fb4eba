"""Before the first step: open the data, leave out outliers, fit baseline and scales."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coset.atomic_files import write_file
from coset.checkpoint import Checkpoint, Provenance, load_checkpoint
from coset.data import pairs
from coset.data.batching import Plan
from coset.data.statistics import Statistics, fit_statistics, usable, whole_units
from coset.data.store import Store
from coset.errors import ConfigError
from coset.pet.hypers import PetHypers, Quantity
from coset.pet.model import Pet
from coset.training.batches import Source
from coset.training.settings import TrainSettings

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Everything that a run needs and that no step changes."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    plan: Plan
    statistics: Statistics
    start: Mapping[str, torch.Tensor] | None
    run_digest: str
    data_digest: str


def prepare(settings: TrainSettings, report: Report) -> Prepared:
    """Open the stores, find the neighbor pairs once, fit baseline and scales, make the plan."""
    train = [open_source(share.path, settings.model, report) for share in settings.data.train]
    valid = [open_source(path, settings.model, report) for path in settings.data.valid]
    stores = [source.store for source in train]
    start = starting_model(settings)
    statistics, kept = _statistics(settings, stores)
    if start is not None:
        statistics = statistics_of(start, statistics)
    kept = [whole_units(source.index, mask) for source, mask in zip(train, kept, strict=True)]
    for store, mask in zip(stores, kept, strict=True):
        if missing := int((~mask).sum()):
            report(
                f"{store.path}: {missing} of {len(mask)} records are left out: unknown elements, "
                "forces, sizes or energies above the limits of [data]"
            )
    batch = settings.batch
    pools = [
        source.pool(mask, share.share)
        for source, mask, share in zip(train, kept, settings.data.train, strict=True)
    ]
    return Prepared(
        train=tuple(train),
        valid=tuple(valid),
        plan=Plan(
            pools=tuple(pools),
            seed=settings.run.seed,
            slots=batch.structures,
            micro_batches=batch.micro_batches,
            window=batch.window,
        ),
        statistics=statistics,
        start=None if start is None else start.weights,
        run_digest=digest_of(settings),
        data_digest=hashlib.sha256("".join(s.sha256 for s in stores).encode()).hexdigest(),
    )


def open_source(path: str, hypers: PetHypers, report: Report) -> Source:
    """A store with its neighbor pairs."""
    store = Store(path)

    def progress(done: int, total: int) -> None:
        report(f"neighbor pairs of {path}: {done}/{total}")

    return Source(store=store, pairs=pairs.build(store, hypers, progress), index=store.index())


def starting_model(settings: TrainSettings) -> Checkpoint | None:
    """The model that the run begins with.

    Raises:
        ConfigError: its network is another than that of the run.
    """
    if not settings.start:
        return None
    start = load_checkpoint(settings.start)
    if start.hypers != settings.model:
        raise ConfigError(
            f"{settings.start} has another network than this run: {start.hypers}, not "
            f"{settings.model}",
            field="start",
        )
    return start


def statistics_of(model: Checkpoint, fitted: Statistics) -> Statistics:
    """Baseline and scales of a model, in place of those fitted to the data."""
    types = list(model.hypers.atomic_types)
    name_of = {target.quantity: target.name for target in model.hypers.targets}
    baseline, forces = np.zeros_like(fitted.baseline), np.ones_like(fitted.forces)
    baseline[types] = [model.baseline[name_of["energy"]][z] for z in types]
    if "direct_forces" in name_of:
        forces[types] = model.scales[name_of["direct_forces"]]
    stress = model.scales.get(name_of.get("direct_stress", ""), fitted.stress)
    energy = model.scales[name_of["energy"]]
    return replace(
        fitted, baseline=baseline, forces=forces, energy=_number(energy), stress=_number(stress)
    )


def _number(scale: float | tuple[float, ...]) -> float:
    return scale[0] if isinstance(scale, tuple) else scale


def digest_of(settings: TrainSettings) -> str:
    """Of what a run cannot change on its way; its stages may be extended, its folders moved.

    Settings that have their default do not count, so that a run outlives the birth of new ones.
    """
    data = replace(
        settings.data,
        valid=(),
        train=tuple(replace(share, path="") for share in settings.data.train),
    )
    parts = [data, settings.model, settings.batch, settings.optimizer]
    facts: list[object] = [_not_default(part) for part in parts]
    facts += [settings.run.seed, Path(settings.start).name]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _not_default(settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """Fields of a dataclass that differ from their default, by name."""
    changed = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        factory = item.default_factory
        default = item.default if factory is MISSING else factory()
        if value != default:
            changed[item.name] = asdict(settings)[item.name]
    return changed


def scales_of(statistics: Statistics, hypers: PetHypers) -> dict[str, float | tuple[float, ...]]:
    """Scale of every target."""
    by_quantity: dict[Quantity, float | tuple[float, ...]] = {
        "energy": statistics.energy,
        "direct_forces": tuple(statistics.forces[list(hypers.atomic_types)].tolist()),
        "direct_stress": statistics.stress,
    }
    return {target.name: by_quantity[target.quantity] for target in hypers.targets}


def checkpoint_of(
    settings: TrainSettings,
    statistics: Statistics,
    network: Pet,
    weights: Sequence[torch.Tensor],
    training: dict[str, str],
) -> Checkpoint:
    """A complete model with the given weights (in the order of `network.parameters()`)."""
    hypers, facts = settings.model, settings.facts
    names = [name for name, _ in network.named_parameters()]
    values = dict(zip(names, weights, strict=True))
    baseline = {int(z): float(statistics.baseline[z]) for z in hypers.atomic_types}
    return Checkpoint(
        hypers=hypers,
        weights={name: values[name] for name in network.state_dict()},
        baseline=dict.fromkeys(hypers.targets_of("energy"), baseline),
        scales=scales_of(statistics, hypers),
        provenance=Provenance(**asdict(facts), training_run=training),
    )


def _statistics(
    settings: TrainSettings, stores: Sequence[Store]
) -> tuple[Statistics, list[np.ndarray]]:
    """Fitted once and kept in the run's directory: a resumed run must not depend on a new fit."""
    path = Path(settings.run.directory) / "statistics.npz"
    if path.is_file():
        data = np.load(path, allow_pickle=False)
        values = {f.name: data[f.name] for f in fields(Statistics)}
        for name in ("energy", "stress"):
            values[name] = float(values[name])
        return Statistics(**values), [data[f"mask_{k}"] for k in range(len(stores))]
    limits = settings.data
    masks = [
        usable(
            store,
            settings.model.atomic_types,
            max_force=limits.max_force,
            max_atoms=limits.max_atoms,
        )
        for store in stores
    ]
    statistics, kept = fit_statistics(stores, masks, settings.data.max_energy)
    arrays = {f.name: np.asarray(getattr(statistics, f.name)) for f in fields(Statistics)}
    arrays |= {f"mask_{k}": mask for k, mask in enumerate(kept)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_file(path, buffer.getvalue())
    return statistics, kept
