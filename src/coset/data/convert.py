"""Sources into a store: checked, split by formula, counted, and resumed where it was stopped."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coset.atomic_files import write_file
from coset.data.cleaning import clean, keep
from coset.data.formula import HELD_OUT, SYMBOLS, held_out
from coset.data.sources import Chunk, Source, store_source
from coset.data.store import SHARD_BYTES, WIDE_POSITIONS, Frames, Store, StoreWriter
from coset.errors import ConfigError, StructureError

Split = Literal["train", "valid", "all"]
PLAN = "conversion.json"
"""What an unfinished store is being made from; it goes when the store is finished."""
MAX_KINDS = 256

Progress = Callable[[int, int], None]
"""Called with the number of sources done and of frames read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertSettings:
    """What becomes of the frames.

    split: train (formulas not held out), valid (those held out) or all; held_out: their share.
    shifts: eV per atom, by chemical symbol, added to the energies (to bring them on another zero).
    wide: positions in float64.
    """

    split: Split = "all"
    held_out: float = HELD_OUT
    shifts: Mapping[str, float] = field(default_factory=dict)
    wide: bool = False
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        """Refuse unknown elements and shares that are none."""
        if unknown := set(self.shifts) - set(SYMBOLS[1:]):
            raise ConfigError(f"shift of unknown elements {sorted(unknown)}", field="shifts")
        if not 0.0 <= self.held_out <= 1.0:
            raise ConfigError(f"held_out = {self.held_out} is no share in [0, 1]", field="held_out")


@dataclass(kw_only=True, slots=True)
class Report:
    """What became of the frames of all sources: read = written + the sum of skipped.

    resumed: frames an interrupted conversion had written before. examples: the first error of some
    reasons. kinds and labels count frames; elements: by symbol, frames with it and its atoms.
    """

    read: int = 0
    written: int = 0
    resumed: int = 0
    atoms: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    dropped_labels: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    elements: dict[str, dict[str, int]] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """All counts by their names."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def add(self, frames: Frames, kinds: Sequence[str]) -> None:
        """Count frames that are part of the store."""
        self.written += len(frames)
        self.atoms += int(frames.n_atoms.sum())
        self.kinds.update(kinds[k] for k in frames.kind.tolist())
        first = np.cumsum(frames.n_atoms) - frames.n_atoms
        self.labels.update(
            {
                "energy": int(np.isfinite(frames.energy).sum()),
                "forces": int(np.isfinite(frames.forces[first, 0]).sum()),
                "stress": int(np.isfinite(frames.stress[:, 0, 0]).sum()),
                "atomic_energies": int(np.isfinite(frames.atomic_energies[first]).sum()),
            }
        )
        atoms = np.bincount(frames.numbers, minlength=len(SYMBOLS))
        frame = np.repeat(np.arange(len(frames)), frames.n_atoms)
        pairs = np.unique(frame * len(SYMBOLS) + frames.numbers) % len(SYMBOLS)
        structures = np.bincount(pairs, minlength=len(SYMBOLS))
        for number in np.flatnonzero(atoms).tolist():
            count = self.elements.setdefault(SYMBOLS[number], {"structures": 0, "atoms": 0})
            count["structures"] += int(structures[number])
            count["atoms"] += int(atoms[number])


def convert(
    sources: Sequence[Source],
    destination: str | Path,
    settings: ConvertSettings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the frames of all sources, in order, to a new store at `destination`.

    The same call goes on where an interrupted one stopped: closed shards stay as they are.

    Raises:
        ConfigError: codes StoreExists, OtherConversion, TooManyKinds.
        StructureError: code EmptyStore, if no frame can be written; codes of the sources.
    """
    settings = settings or ConvertSettings()
    kinds = list(dict.fromkeys(name for source in sources for name in source.kinds))
    if len(kinds) > MAX_KINDS:
        hint = "give several files one name (--kind)"
        raise ConfigError(
            f"{len(kinds)} kinds, at most {MAX_KINDS}", code="TooManyKinds", hint=hint
        )
    writer = StoreWriter(
        destination,
        kinds=kinds,
        facts={},
        kind_facts=_kind_facts(sources),
        wide=settings.wide,
        shard_bytes=settings.shard_bytes,
    )
    _check_plan(writer, sources, settings)
    report = Report(resumed=writer.n_done)
    for done, source in enumerate(sources):
        numbering = np.array([kinds.index(name) for name in source.kinds], np.uint8)
        for chunk in source.chunks():
            frames = _selected(chunk, settings, report)
            frames = replace(frames, kind=numbering[frames.kind])
            there = min(max(writer.n_done - report.written, 0), len(frames))
            report.add(frames, kinds)
            writer.append(frames.take(np.arange(there, len(frames))))
            if progress is not None:
                progress(done, report.read)
    if not report.written:
        raise StructureError(
            f"none of {report.read} frames can be written: {dict(report.skipped)}",
            code="EmptyStore",
            hint="look at the reasons; another split or other label names may be what is meant",
        )
    writer.facts = _facts(sources, settings, report)
    writer.finish()
    (writer.path / PLAN).unlink(missing_ok=True)
    return report


def split_store(
    store: str | Path,
    train: str | Path,
    valid: str | Path,
    share: float = HELD_OUT,
    progress: Progress | None = None,
) -> tuple[Report, Report]:
    """Part a store by formula: `share` of all formulas to `valid`, the others to `train`."""
    source = store_source(store)
    wide = bool((Store(store).index()["flags"] & WIDE_POSITIONS).any())
    sides: tuple[tuple[str | Path, Split], ...] = ((train, "train"), (valid, "valid"))
    first, second = (
        convert([source], path, ConvertSettings(split=side, held_out=share, wide=wide), progress)
        for path, side in sides
    )
    return first, second


def _selected(chunk: Chunk, settings: ConvertSettings, report: Report) -> Frames:
    """The frames of a chunk that belong into the store; the others are counted."""
    report.read += len(chunk.frames) + sum(chunk.unusable.values())
    report.skipped.update(chunk.unusable)
    report.examples = {**chunk.examples, **report.examples}
    frames, reasons, dropped = clean(chunk.frames)
    report.dropped_labels.update(dropped + Counter(chunk.spoiled))
    if settings.split != "all":
        held = held_out(frames.formula_hash, settings.held_out)
        other = held if settings.split == "train" else ~held
        reasons[other & (reasons == "")] = f"not in the {settings.split} part"
    report.skipped.update(reason for reason in reasons.tolist() if reason)
    return _shifted(keep(frames, reasons == ""), settings.shifts)


def _shifted(frames: Frames, shifts: Mapping[str, float]) -> Frames:
    if not shifts:
        return frames
    by_number = np.array([shifts.get(symbol, 0.0) for symbol in SYMBOLS])
    per_atom = by_number[frames.numbers]
    frame = np.repeat(np.arange(len(frames)), frames.n_atoms)
    total = np.bincount(frame, per_atom, minlength=len(frames))
    return replace(
        frames,
        energy=frames.energy + total,
        atomic_energies=frames.atomic_energies + per_atom.astype(frames.atomic_energies.dtype),
    )


def _check_plan(writer: StoreWriter, sources: Sequence[Source], settings: ConvertSettings) -> None:
    """Note what the store is made from, or check that it is what was noted before."""
    files = [{"name": s.name, "sha256": s.sha256, "kinds": s.kinds, **s.details} for s in sources]
    plan = {"sources": files, "settings": asdict(settings)}
    text = json.dumps(plan, ensure_ascii=False, indent=1).encode()
    path = writer.path / PLAN
    if writer.shards and not (path.is_file() and path.read_bytes() == text):
        raise ConfigError(
            f"{writer.path} holds the beginning of another conversion",
            code="OtherConversion",
            hint="repeat the command that began it, or choose another directory",
        )
    write_file(path, text)


def _kind_facts(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """License and citation by kind; where sources of one kind differ, all of them."""
    texts: dict[str, dict[str, list[str]]] = {}
    for source in sources:
        for kind, facts in source.kind_facts.items():
            for key, text in facts.items():
                texts.setdefault(kind, {}).setdefault(key, []).append(text)
    return {
        kind: {key: "; ".join(dict.fromkeys(several)) for key, several in facts.items()}
        for kind, facts in texts.items()
    }


def _facts(sources: Sequence[Source], settings: ConvertSettings, report: Report) -> dict[str, Any]:
    """What the manifest says beyond the bytes."""
    return {
        "split": {
            "part": settings.split,
            "rule": "int(sha256(reduced formula)[:8], 16), see coset.data.formula.held_out",
            "held_out": settings.held_out,
        },
        "sources": [
            {"name": source.name, "sha256": source.sha256, **source.details} for source in sources
        ],
        "shifts_eV_per_atom": dict(settings.shifts),
        "read": report.read,
        "skipped": dict(report.skipped),
        "dropped_labels": dict(report.dropped_labels),
        "labels": dict(report.labels),
        "elements": {
            symbol: report.elements[symbol] for symbol in SYMBOLS if symbol in report.elements
        },
    }
