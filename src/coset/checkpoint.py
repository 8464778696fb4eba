"""Our model file: a directory (or zip) of `model.safetensors` and `manifest.json`, nothing to run.

Every key of the manifest must be known, every number finite and in range, and three digests tie it
together: of the weights file, of every tensor, and of the manifest itself, because one flipped
digit of a baseline energy is as wrong as one flipped bit of a weight. A manifest of an older format
passes through `MIGRATIONS`; one of a newer format is refused.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

import coset
from coset.atomic_files import write_directory, write_file
from coset.checkpoint_formats import FORMAT, MIGRATIONS
from coset.errors import CheckpointError, ConfigError
from coset.pet.hypers import PetHypers, Quantity, Target
from coset.stored_zip import open_zip, read_member, stored_members, zip_bytes
from coset.strict_json import (
    Json,
    as_dataclass,
    as_object,
    as_type,
    check_keys,
    corrupt,
    parse_json,
    some,
)

MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
LLPR = "llpr."
MAX_MANIFEST_BYTES = 16 << 20
UNITS = {"energy": "eV", "length": "Å", "forces": "eV/Å", "stress": "eV/Å³"}
STORED_DTYPES = (torch.float64, torch.float32, torch.float16)
KEYS = {
    "format", "architecture", "coset_version", "created", "config", "atomic_types", "units",
    "targets", "baseline", "scales", "provenance", "card", "sha256",
}  # fmt: skip


class TargetFacts(NamedTuple):
    """What the numbers of a quantity are."""

    unit: str
    rank: int
    per: str


FACTS: dict[Quantity, TargetFacts] = {
    "energy": TargetFacts("eV", 0, "system"),
    "direct_forces": TargetFacts("eV/Å", 1, "atom"),
    "direct_stress": TargetFacts("eV/Å³", 2, "system"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a model comes from, in words; nothing here changes a number."""

    name: str
    version: str = ""
    description: str = ""
    level_of_theory: str = ""
    training_data: str = ""
    license: str = ""
    citation: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    source: str = ""
    source_sha256: str = ""
    source_format: str = ""
    importer: str = ""
    conversions: tuple[str, ...] = ()
    dropped_targets: tuple[str, ...] = ()
    training_run: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    coset_version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete model: prediction = network output * scale (+ baseline[Z] per atom: energies).

    Attributes:
        hypers: the network.
        weights: its state dict, one float dtype, names and shapes of `hypers.parameter_shapes()`.
        baseline: eV per atom of every element, for every energy target.
        scales: one number per target, or for per-atom targets one per element, in the order of
            `hypers.atomic_types`.
        provenance: origin, license, level of theory.
        levels_of_theory: of single targets, where they differ from that of the model.
        card: metrics and known limits, any JSON.
        llpr: tensors of the last-layer uncertainty, if the model has it.
        sha256: of the file this was read from.
    """

    hypers: PetHypers
    weights: Mapping[str, Tensor]
    baseline: Mapping[str, Mapping[int, float]]
    scales: Mapping[str, float | tuple[float, ...]]
    provenance: Provenance
    levels_of_theory: Mapping[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    llpr: Mapping[str, Tensor] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        """Refuse weights, baselines and scales that do not belong to the network."""
        _check_weights(self.weights, self.hypers.parameter_shapes())
        targets = {target.name: target for target in self.hypers.targets}
        energies = self.hypers.targets_of("energy")
        check_keys(self.baseline, energies, "baseline")
        for name in energies:
            check_keys(self.baseline[name], self.hypers.atomic_types, f"baseline.{name}")
            _check_finite(self.baseline[name].values(), f"baseline.{name}")
        check_keys(self.scales, targets, "scales")
        for name, target in targets.items():
            _check_scale(self.scales[name], target, len(self.hypers.atomic_types))
        if unknown := set(self.levels_of_theory) - set(targets):
            raise corrupt(f"levels_of_theory names {sorted(unknown)}, which are no targets")

    def level_of_theory(self, target: str) -> str:
        """Level of theory of one target."""
        return self.levels_of_theory.get(target, self.provenance.level_of_theory)


def save_checkpoint(checkpoint: Checkpoint, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model in one step: a zip file if the name ends in .zip, else a directory.

    Raises:
        CheckpointError: a tensor is not finite, or `path` exists and may not be replaced.
    """
    target = Path(path)
    _check_replaceable(target, overwrite=overwrite)
    files = checkpoint_files(checkpoint)
    if target.suffix == ".zip":
        write_file(target, zip_bytes(files))
    else:
        write_directory(target, files)
    return target


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Names and contents of the files of a model.

    Raises:
        CheckpointError: a tensor is not finite.
    """
    llpr = {LLPR + name: tensor for name, tensor in checkpoint.llpr.items()}
    named = {**checkpoint.weights, **llpr}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    _check_tensors_finite(tensors)
    weights = tensors_to_bytes(tensors)
    manifest = _plain_json(_manifest(checkpoint))
    manifest["sha256"] = {
        WEIGHTS: hashlib.sha256(weights).hexdigest(),
        "tensors": {name: _tensor_digest(tensor) for name, tensor in tensors.items()},
    }
    manifest["sha256"][MANIFEST] = manifest_digest(manifest)
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    return {MANIFEST: text.encode(), WEIGHTS: weights}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model of our format, verifying every digest; float16 weights become float32.

    Raises:
        CheckpointError: code `ModelNotFound`, `ModelTooNew`, `ModelCorrupt` or `NonFiniteWeights`.
    """
    files = _read_zip(Path(path)) if Path(path).is_file() else _read_directory(Path(path))
    manifest = _checked_manifest(parse_json(files[MANIFEST], MANIFEST))
    hypers = _hypers(manifest)
    least = hypers.n_parameters() * torch.float16.itemsize
    if len(files[WEIGHTS]) < least:
        raise corrupt(
            f"the network in {MANIFEST} needs at least {least:,} bytes of weights, {WEIGHTS} has "
            f"{len(files[WEIGHTS]):,}"
        )
    tensors = _verified_tensors(files[WEIGHTS], manifest["sha256"])
    _check_tensors_finite(tensors)
    facts = {name: manifest[name] for name in ("created", "coset_version")}
    facts |= manifest["provenance"]
    levels = {name: table["level_of_theory"] for name, table in manifest["targets"].items()}
    return Checkpoint(
        hypers=hypers,
        weights={n: t for n, t in tensors.items() if not n.startswith(LLPR)},
        llpr={n.removeprefix(LLPR): t for n, t in tensors.items() if n.startswith(LLPR)},
        baseline={t: _baseline(table, t) for t, table in manifest["baseline"].items()},
        scales={t: _scale(value, t) for t, value in manifest["scales"].items()},
        provenance=as_dataclass(Provenance, facts, "provenance"),
        levels_of_theory={name: level for name, level in levels.items() if level},
        card=manifest["card"],
        sha256=manifest["sha256"][WEIGHTS],
    )


def manifest_digest(manifest: Json) -> str:
    """sha256 of everything in a manifest but this digest itself, whatever the white space."""
    digests = {name: value for name, value in manifest["sha256"].items() if name != MANIFEST}
    content = {**manifest, "sha256": digests}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_directory(path: Path) -> dict[str, bytes]:
    files = {name: path / name for name in (MANIFEST, WEIGHTS)}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise CheckpointError(
            f"{path} is no model: {', '.join(missing)} not found", code="ModelNotFound"
        )
    _check_manifest_size(files[MANIFEST].stat().st_size)
    return {name: file.read_bytes() for name, file in files.items()}


def _read_zip(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file, open_zip(file, str(path)) as archive:
        members = stored_members(archive, path.stat().st_size)
        check_keys(members, (MANIFEST, WEIGHTS), str(path))
        _check_manifest_size(members[MANIFEST].file_size)
        return {name: read_member(archive, member) for name, member in members.items()}


def _check_manifest_size(size: int) -> None:
    if size > MAX_MANIFEST_BYTES:
        raise corrupt(f"{MANIFEST} has {size:,} bytes, at most {MAX_MANIFEST_BYTES:,} expected")


def _checked_manifest(manifest: Json) -> Json:
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise corrupt(f"{MANIFEST}: format = {version!r}, expected a positive integer")
    if version > FORMAT:
        raise CheckpointError(
            f"the model has format {version}, coset {coset.__version__} reads up to {FORMAT}",
            code="ModelTooNew",
            hint="upgrade coset",
        )
    digests = as_object(manifest.get("sha256"), "sha256")
    if digests.get(MANIFEST) != manifest_digest(manifest):
        raise corrupt(f"{MANIFEST} does not have the sha256 it states: it changed after writing")
    for step in range(version, FORMAT):
        manifest = MIGRATIONS[step](manifest)
    check_keys(manifest, KEYS, MANIFEST)
    check_keys(digests, (MANIFEST, WEIGHTS, "tensors"), "sha256")
    for key in ("config", "targets", "baseline", "scales", "provenance", "card"):
        as_object(manifest[key], key)
    if manifest["architecture"] != "pet" or manifest["units"] != UNITS:
        raise corrupt(
            f"architecture {manifest['architecture']!r} in units {manifest['units']!r}, expected "
            f"'pet' in {UNITS}"
        )
    return manifest


def _hypers(manifest: Json) -> PetHypers:
    types = as_type(tuple[int, ...], manifest["atomic_types"], "atomic_types")
    targets = tuple(_target(name, table) for name, table in manifest["targets"].items())
    config, hints = manifest["config"], get_type_hints(PetHypers)
    own = {"atomic_types": types, "targets": targets}
    check_keys(config, {f.name for f in fields(PetHypers)} - set(own), "config")
    try:
        values = {key: as_type(hints[key], value, key) for key, value in config.items()}
        return PetHypers(**cast("Json", {**own, **values}))
    except ConfigError as error:
        raise corrupt(f"{MANIFEST}: {error}") from None


def _target(name: str, table: object) -> Target:
    stated = as_object(table, f"targets.{name}")
    for quantity, facts in FACTS.items():
        level = as_type(str, stated.get("level_of_theory"), f"targets.{name}.level_of_theory")
        if stated == {"quantity": quantity, **facts._asdict(), "level_of_theory": level}:
            return Target(name=name, quantity=quantity)
    raise corrupt(f"targets.{name}: {stated} does not describe one of {', '.join(FACTS)}")


def _baseline(table: object, target: str) -> dict[int, float]:
    where = f"baseline.{target}"
    values = cast("dict[str, float]", as_type(Mapping[str, float], table, where))
    if bad := [key for key in values if not (key.isdecimal() and key == str(int(key)))]:
        raise corrupt(f"{where} has keys {bad[:5]}, expected atomic numbers")
    return {int(key): value for key, value in values.items()}


def _scale(value: object, target: str) -> float | tuple[float, ...]:
    hint = tuple[float, ...] if type(value) is list else float
    return cast("float | tuple[float, ...]", as_type(hint, value, f"scales.{target}"))


def _verified_tensors(data: bytes, digests: Json) -> dict[str, Tensor]:
    try:
        tensors = tensors_from_bytes(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise corrupt(f"{WEIGHTS} is not a safetensors file: {error}") from None
    stated = as_object(digests["tensors"], "sha256.tensors")
    check_keys(tensors, stated, WEIGHTS)
    bad = [name for name, tensor in tensors.items() if _tensor_digest(tensor) != stated[name]]
    if bad or hashlib.sha256(data).hexdigest() != digests[WEIGHTS]:
        raise corrupt(f"{WEIGHTS} does not have its sha256; damaged: {some(bad) or 'its header'}")
    return {n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items()}


def _tensor_digest(tensor: Tensor) -> str:
    raw = tensor.reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    check_keys(weights, shapes, "weights")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise corrupt(f"weight {name} has shape {tuple(weights[name].shape)}, not {shape}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not dtypes <= set(STORED_DTYPES):
        raise corrupt(f"weights have dtypes {dtypes}, expected one of {STORED_DTYPES}")


def _check_scale(scale: float | tuple[float, ...], target: Target, n_species: int) -> None:
    values = scale if isinstance(scale, tuple) else (scale,)
    _check_finite(values, f"scales.{target.name}")
    allowed = {1, n_species} if FACTS[target.quantity].per == "atom" else {1}
    if len(values) not in allowed or min(values) < 0:
        raise corrupt(f"scale of {target.name} is {scale}, expected {allowed} positive numbers")


def _check_finite(values: Iterable[float], what: str) -> None:
    if bad := [value for value in values if not math.isfinite(value)]:
        raise corrupt(f"{what} holds {bad[0]}, expected finite numbers")


def _check_tensors_finite(tensors: Mapping[str, Tensor]) -> None:
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"NaN or infinity in {some(bad)}",
            code="NonFiniteWeights",
            hint="the training diverged; use an earlier checkpoint",
        )


def _manifest(checkpoint: Checkpoint) -> Json:
    hypers, provenance = checkpoint.hypers, asdict(checkpoint.provenance)
    config = asdict(hypers)
    for name in ("atomic_types", "targets"):
        config.pop(name)
    for name in ("created", "coset_version"):
        provenance.pop(name)
    levels = checkpoint.levels_of_theory
    return {
        "format": FORMAT,
        "architecture": "pet",
        "coset_version": coset.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
        "atomic_types": list(hypers.atomic_types),
        "units": UNITS,
        "targets": {
            name: {
                "quantity": quantity,
                **FACTS[quantity]._asdict(),
                "level_of_theory": levels.get(name, ""),
            }
            for name, quantity in ((t.name, t.quantity) for t in hypers.targets)
        },
        "baseline": checkpoint.baseline,
        "scales": checkpoint.scales,
        "provenance": provenance,
        "card": checkpoint.card,
    }


def _plain_json(manifest: Json) -> Json:
    """What a reader of the written manifest will see."""
    try:
        text = json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"card or provenance cannot be written as JSON: {error}") from None
    return parse_json(text.encode(), MANIFEST)


def _check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Replace nothing unasked, and never a directory that holds anything but a model."""
    if not path.exists():
        return
    foreign = path.is_dir() and {child.name for child in path.iterdir()} - {MANIFEST, WEIGHTS}
    if foreign or not overwrite:
        raise CheckpointError(
            f"{path} exists" + (f" and holds {some(foreign)}" if foreign else ""),
            code="ModelExists",
            hint="choose another name" + ("" if foreign else " or allow overwriting"),
        )
