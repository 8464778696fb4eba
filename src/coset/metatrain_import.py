"""PET checkpoints of metatrain (and upet), read without metatrain and without running anything.

A metatrain `.ckpt` is a zip file of raw tensor storages and of one pickle that ties them together.
`torch.load` would run that pickle. Here it is read by `pickle_data`, which cannot import or call
anything and is bounded in time and memory; only the storages of the wanted weights are read, from
plainly stored zip members. So the import needs no separate process, and a file that does not pass
is refused: there is no second, more trusting way in.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

import coset
from coset import metatrain_upgrade as upgrade
from coset.checkpoint import Checkpoint, Provenance
from coset.errors import CheckpointError
from coset.metatrain_upgrade import State, TargetMeaning
from coset.pet.hypers import PetHypers, Target
from coset.pickle_data import TensorRef, plain_data, read_pickle
from coset.stored_zip import open_zip, read_member, stored_members
from coset.strict_json import Json, corrupt, parse_json
from coset.tensor_map import read_block

PET_NAMES = ("pet", "experimental.pet")
LLPR_NAMES = ("llpr", "experimental.llpr")
LLPR_NEWEST = 4
LORA_ALPHA = 8.0
NEVER_READ = ("dummy_buffer", "type_to_index")
MEMBER = re.compile(
    r"[^/]+/(data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id)"
)
FOREIGN = (
    (re.compile(r"(^|/)(constants\.pkl$|code/)"), "a TorchScript program (.pt)"),
    (re.compile(r"aotinductor|archive_format$|\.(so|cubin)$"), "a compiled program (.pt2)"),
)
MAGIC = (
    (b"\x1f\x8b", "compressed by gzip; decompress it first"),
    (b"\x80", "a bare pickle, which is never read"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The parts of one PET checkpoint that matter."""

    version: int
    hypers: Json
    state: State
    targets: Mapping[str, TargetMeaning]
    lora_alpha: float | None
    metadata: Json
    llpr: State
    llpr_hypers: Json
    llpr_version: int | None
    length_note: str

    @property
    def large_scale(self) -> bool:
        """Whether this is one of the early large models (before version 8)."""
        return self.version < 8 and upgrade.LARGE_SCALE_MARK in self.state

    @property
    def kept(self) -> dict[str, TargetMeaning]:
        """Targets that have a quantity of ours."""
        return {name: m for name, m in self.targets.items() if m.quantity is not None}


def import_metatrain(path: str | Path) -> Checkpoint:
    """The model in a metatrain or upet `.ckpt` file, model versions 1 to 16.

    Raises:
        CheckpointError: code `ModelNotFound`, `ModelForeign`, `ModelTooNew`, `ModelCorrupt`,
            `UnsafePickle`, `LongRangeUnsupported`, `UnitUnsupported` or `ArchitectureUnsupported`.
    """
    place = Path(path)
    if not place.is_file():
        raise CheckpointError(f"{place} is no file", code="ModelNotFound")
    with place.open("rb") as file:
        _refuse_by_magic(file, place)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with open_zip(file, str(place)) as archive:
            try:
                source = _source(_Storages(archive, os.fstat(file.fileno()).st_size))
                return _checkpoint(source, place, sha256)
            except CheckpointError:
                raise
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise corrupt(f"{place} lacks parts of a model: {error!s:.200}") from None


def _checkpoint(source: _Source, path: Path, sha256: str) -> Checkpoint:
    hypers = _hypers(source)
    order = {name: i for i, name in enumerate(source.targets)}
    types, kept = hypers.atomic_types, source.kept
    return Checkpoint(
        hypers=hypers,
        weights=_weights(source),
        baseline={
            name: upgrade.baseline_of(source.state, name, types, kept[name].factor)
            for name in hypers.targets_of("energy")
        },
        scales={
            name: upgrade.scale_of(source.state, name, order[name], types, meaning.factor)
            for name, meaning in kept.items()
        },
        provenance=_provenance(source, path, sha256),
        card={"llpr": source.llpr_hypers} if source.llpr else {},
        llpr=source.llpr,
        sha256=sha256,
    )


def _hypers(source: _Source) -> PetHypers:
    if not source.kept:
        reasons = "; ".join(f"{name}: {m.note}" for name, m in source.targets.items())
        raise CheckpointError(
            f"the checkpoint predicts nothing that coset uses ({reasons})",
            code="ArchitectureUnsupported",
        )
    settings = upgrade.network_settings(
        source.hypers, source.version, large_scale=source.large_scale
    )
    energies = [m for m in source.kept.values() if m.quantity == "energy"]
    if settings.zbl and not all(meaning.has_zbl for meaning in energies):
        raise CheckpointError(
            "the checkpoint adds a short-range repulsion to some of its energies only",
            code="ArchitectureUnsupported",
        )
    prefix = upgrade.PREFIX if source.version >= upgrade.PREFIX_SINCE else ""
    return PetHypers(
        atomic_types=upgrade.element_order(source.state[f"{prefix}species_to_species_index"]),
        targets=tuple(
            Target(name=name, quantity=meaning.quantity)
            for name, meaning in source.kept.items()
            if meaning.quantity is not None
        ),
        network=settings.network,
        cutoff=settings.cutoff,
        conditioning=settings.conditioning,
        zbl=float(settings.zbl),
        numerics="metatrain",
        norm_eps=None,
    )


def _weights(source: _Source) -> State:
    state = upgrade.network_state(source.state, source.version, large_scale=source.large_scale)
    merged = upgrade.merge_lora(state, source.lora_alpha)
    return upgrade.without_block_names(merged, set(source.targets) - set(source.kept))


def _provenance(source: _Source, path: Path, sha256: str) -> Provenance:
    metadata = source.metadata
    references = metadata.get("references", {})
    kinds = sorted(references, key=lambda kind: (kind != "model", kind))
    wrapper = f" in llpr v{source.llpr_version}" if source.llpr_version else ""
    notes = [f"{name}: {m.note}" for name, m in source.kept.items() if m.note]
    if source.length_note:
        notes.append(source.length_note)
    if any(".lora_A." in name for name in source.state):
        notes.append(f"LoRA updates merged with alpha = {source.lora_alpha}")
    if source.llpr_version and not source.llpr:
        notes.append("uncertainty (LLPR) dropped, because it is not in eV")
    return Provenance(
        name=metadata.get("name") or path.stem,
        description=metadata.get("description", ""),
        authors=tuple(metadata.get("authors", ())),
        citation=tuple(text for kind in kinds for text in references[kind]),
        source=path.name,
        source_sha256=sha256,
        source_format=f"metatrain pet v{source.version}{wrapper}",
        importer=f"coset {coset.__version__}",
        conversions=tuple(notes),
        dropped_targets=tuple(
            f"{name}: {m.note}" for name, m in source.targets.items() if m.quantity is None
        ),
    )


def _source(storages: "_Storages") -> _Source:
    outer = storages.pickle()
    is_llpr = outer["architecture_name"] in LLPR_NAMES
    inner = outer["wrapped_model_checkpoint"] if is_llpr else outer
    if inner["architecture_name"] not in PET_NAMES:
        raise CheckpointError(
            f"the checkpoint holds a {plain_data(inner['architecture_name'])!r:.60} model",
            code="ArchitectureUnsupported",
            hint="coset reads PET, alone or with last-layer uncertainties (llpr)",
        )
    version = _version(inner, upgrade.NEWEST)
    llpr_version = _version(outer, LLPR_NEWEST) if is_llpr else None
    info = inner["model_data"]["dataset_info"].state
    targets = {str(name): _target(name, t.state, storages) for name, t in info["targets"].items()}
    in_ev = all(meaning.factor == 1 for meaning in targets.values())
    return _Source(
        version=version,
        hypers=plain_data(inner["model_data"]["model_hypers"]),
        state=storages.state(_best(inner, version)),
        targets=targets,
        lora_alpha=_lora_alpha(inner),
        metadata=_metadata(inner, outer),
        llpr=upgrade.llpr_state(storages.state(_best(outer, None)), llpr_version)
        if llpr_version and in_ev
        else {},
        llpr_hypers=plain_data(outer.get("model_data", {}).get("hypers", {})),
        llpr_version=llpr_version,
        length_note=upgrade.length_note(plain_data(info["length_unit"])),
    )


def _version(checkpoint: Json, newest: int) -> int:
    version = checkpoint["model_ckpt_version"]
    if type(version) is not int or version < 1:
        raise corrupt("model_ckpt_version is no positive integer")
    if version > newest:
        raise CheckpointError(
            f"the checkpoint has metatrain model version {version}, coset {coset.__version__} "
            f"reads up to {newest}",
            code="ModelTooNew",
            hint="upgrade coset",
        )
    return version


def _best(checkpoint: Json, version: int | None) -> Json:
    """The weights metatrain would export: the best ones, the last ones where those are missing."""
    last = checkpoint.get("model_state_dict") or checkpoint.get("state_dict") or {}
    large_scale = version is not None and version < 8 and upgrade.LARGE_SCALE_MARK in last
    best: Json = checkpoint.get("best_model_state_dict") or last
    return last if large_scale else best


def _target(name: str, state: Json, storages: "_Storages") -> TargetMeaning:
    if not name.isprintable():
        raise corrupt(f"a target has the name {name!r:.60}")
    layout = read_block(storages.tensor(state["layout"].state[0]).numpy().tobytes())
    quantity, unit = (plain_data(state.get(key, "")) for key in ("quantity", "unit"))
    return upgrade.target_meaning(name, quantity, unit, layout)


def _lora_alpha(checkpoint: Json) -> float | None:
    """Strength of the LoRA updates, from where metatrain keeps its fine-tuning settings."""
    states = [checkpoint.get(key) or {} for key in ("best_model_state_dict", "model_state_dict")]
    stated = [state.get("finetune_config") for state in states]
    for finetune in (*stated, checkpoint.get("train_hypers", {}).get("finetune")):
        settings = plain_data(finetune) or {}
        if settings.get("method") == "lora":
            return float(settings.get("config", {}).get("alpha", LORA_ALPHA))
    return None


def _metadata(inner: Json, outer: Json) -> Json:
    """Name, authors and references; those of the wrapped model before those of its wrapper."""
    found: Json = {}
    for checkpoint in (inner, outer):
        if (record := checkpoint.get("metadata")) is not None:
            parsed = plain_data(parse_json(record.state[0].encode(), "metadata"))
            found = found if found.get("name") else parsed
    return found


class _Storages:
    """The zip file: its pickle, and tensors read when asked for."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        """Check every member before any is read."""
        for pattern, what in FOREIGN:
            if any(pattern.search(name) for name in archive.namelist()):
                raise CheckpointError(
                    f"the file is {what}, which would have to be executed",
                    code="ModelForeign",
                    hint="get the .ckpt file from which it was exported",
                )
        self.archive = archive
        self.members = stored_members(archive, size)
        self.root = next(iter(self.members), "").split("/")[0]
        self.left = 2 * size
        for name in self.members:
            if not (MEMBER.fullmatch(name) and name.startswith(f"{self.root}/")):
                raise corrupt(f"zip member {name!r:.120} does not belong into a checkpoint")
        if self._read("byteorder") not in (b"", b"little"):
            raise corrupt("the checkpoint was written on a big-endian machine")

    def _read(self, name: str) -> bytes:
        member = self.members.get(f"{self.root}/{name}")
        return read_member(self.archive, member) if member else b""

    def pickle(self) -> Json:
        """The dict that ties the storages together."""
        content = read_pickle(self._read("data.pkl"))
        if type(content) is not dict:
            raise corrupt("the pickle does not hold a dict")
        return content

    def state(self, references: Json) -> State:
        """The tensors of a state dict."""
        return {
            name: self.tensor(reference)
            for name, reference in references.items()
            if type(reference) is TensorRef and not name.endswith(NEVER_READ)
        }

    def tensor(self, reference: TensorRef) -> Tensor:
        """One tensor, copied from its storage."""
        storage, offset, shape, strides = reference
        data = self._read(f"data/{storage.key}")
        self.left -= len(data)
        if len(data) != storage.size * storage.dtype.itemsize or self.left < 0:
            raise corrupt(f"storage {storage.key:.20} has {len(data):,} bytes, not those it states")
        if not data:
            return torch.empty(shape, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(shape, strides, offset).contiguous()


def _refuse_by_magic(file: BinaryIO, path: Path) -> None:
    head = file.read(2)
    file.seek(0)
    for magic, what in MAGIC:
        if head.startswith(magic):
            raise CheckpointError(f"{path} is {what}", code="ModelForeign")
