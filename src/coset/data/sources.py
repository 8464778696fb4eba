"""What a store is made from: our corpus files, other stores, and any file that ASE reads.

Every source yields chunks of `Frames` in a fixed order, so that an interrupted conversion can be
repeated up to the place where it stopped.
"""

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coset.ase_interface.training import LabelledFrame, LabelReading, read_labelled
from coset.data.formula import formula_hashes
from coset.data.store import MANIFEST, Frames, Store, sha256_of
from coset.errors import StructureError

CHUNK = 2000
CORPUS_KINDS = (
    "equilibrium", "eos", "strain", "rattle", "relax", "pair+", "pair-", "cluster", "slab",
    "dimer", "md", "defect", "random", "molecule", "atom",
)  # fmt: skip
ORIGINS = ("sources", "split", "shifts_eV_per_atom")
"""What the manifest of a store says about where its frames come from."""

PLUS, MINUS = CORPUS_KINDS.index("pair+"), CORPUS_KINDS.index("pair-")
CORPUS_ARRAYS = (
    "ptr", "numbers", "positions", "cell", "pbc", "energy", "forces", "stress", "atomic_energy",
    "kind", "pair_id",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive frames of a source.

    unusable: frames it could not give; spoiled: labels it had to leave out; both by reason.
    examples: one of the errors for each reason.
    """

    frames: Frames
    unusable: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    spoiled: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Something to convert. kinds: names of the values of `Frames.kind` in its chunks.

    kind_facts: license and citation by kind; details: how it is read.
    """

    name: str
    sha256: str
    kinds: tuple[str, ...]
    chunks: Callable[[], Iterator[Chunk]]
    kind_facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def read_corpus(path: str | Path) -> Iterator[Chunk]:
    """Frames of a corpus file (.npz); the two frames of a pair follow each other, pair+ first.

    A frame of a pair without its partner stands alone.

    Raises:
        StructureError: code `UnreadableSource`, if the file is no corpus file.
    """
    arrays = _corpus_arrays(Path(path))
    ends = arrays["ptr"][1:].astype(np.int64)
    n_atoms = np.diff(arrays["ptr"]).astype(np.int64)
    order, units = _pairs(arrays["kind"], arrays["pair_id"])
    n_frames = len(n_atoms)
    frames = Frames(
        n_atoms=n_atoms,
        numbers=arrays["numbers"][: ends[-1] if n_frames else 0],
        positions=arrays["positions"],
        cell=arrays["cell"],
        pbc=arrays["pbc"],
        energy=arrays["energy"],
        forces=arrays["forces"],
        stress=arrays["stress"],
        atomic_energies=arrays["atomic_energy"],
        charge=np.zeros(n_frames, np.int64),
        spin_multiplicity=np.ones(n_frames, np.int64),
        kind=arrays["kind"],
        unit=units,
        formula_hash=formula_hashes(n_atoms, arrays["numbers"]),
    )
    for start, end in _cuts(units[order]):
        yield Chunk(frames=frames.take(order[start:end]))


def read_store(path: str | Path) -> Iterator[Chunk]:
    """Frames of a finished store, in its order."""
    store = Store(path)
    for start, end in _cuts(store.index()["unit"]):
        yield Chunk(frames=store.read(np.arange(start, end)))


def read_ase(path: str | Path, reading: LabelReading | None = None) -> Iterator[Chunk]:
    """Frames of any file that ASE reads, with their labels (see `coset.ase_interface.training`)."""
    found: list[LabelledFrame] = []
    errors: list[StructureError] = []
    for frame in read_labelled(str(path), reading or LabelReading()):
        if isinstance(frame, StructureError):
            errors.append(frame)
        else:
            found.append(frame)
        if len(found) + len(errors) == CHUNK:
            yield _chunk(found, errors)
            found, errors = [], []
    yield _chunk(found, errors)


def open_source(
    path: str | Path,
    *,
    kind: str = "",
    facts: Mapping[str, str] | None = None,
    reading: LabelReading | None = None,
) -> Source:
    """A store, a corpus file (.npz) or any file that ASE reads, by what is there.

    kind: what the frames of an ASE file are called, by default as the file; facts: license and
    citation; reading: units and names of the labels of an ASE file.

    Raises:
        StructureError: code `UnreadableSource`.
        ConfigError: codes of `Store`.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return store_source(path)
    if not path.is_file():
        raise StructureError(f"{path} is neither a file nor a store", code="UnreadableSource")
    if path.suffix == ".npz":
        return corpus_source(path, facts)
    reading = reading or LabelReading()
    name = kind or path.stem
    return Source(
        name=path.name,
        sha256=sha256_of(path),
        kinds=(name,),
        chunks=lambda: read_ase(path, reading),
        kind_facts={name: facts or {}},
        details=asdict(reading),
    )


def corpus_source(path: str | Path, facts: Mapping[str, str] | None = None) -> Source:
    """A corpus file as a source; facts: its license and citation."""
    return Source(
        name=Path(path).name,
        sha256=sha256_of(Path(path)),
        kinds=CORPUS_KINDS,
        chunks=lambda: read_corpus(path),
        kind_facts=dict.fromkeys(CORPUS_KINDS, facts or {}),
    )


def store_source(path: str | Path) -> Source:
    """A finished store as a source; its licenses and citations stay with its kinds."""
    store = Store(path)
    return Source(
        name=Path(path).name,
        sha256=store.sha256,
        kinds=tuple(store.kinds),
        chunks=lambda: read_store(path),
        kind_facts={
            kind["name"]: {k: kind[k] for k in ("license", "citation") if k in kind}
            for kind in store.manifest["kinds"]
        },
        details={key: store.manifest[key] for key in ORIGINS if key in store.manifest},
    )


def _chunk(found: list[LabelledFrame], errors: list[StructureError]) -> Chunk:
    n_atoms = np.array([len(one.numbers) for one in found], np.int64)
    numbers = np.concatenate([np.zeros(0, np.uint8), *(one.numbers for one in found)])
    n_frames = len(found)
    frames = Frames(
        n_atoms=n_atoms,
        numbers=numbers,
        positions=np.concatenate([np.zeros((0, 3)), *(one.positions for one in found)]),
        cell=np.array([one.cell for one in found]).reshape(-1, 3, 3),
        pbc=np.array([one.pbc for one in found], bool).reshape(-1, 3),
        energy=np.array([one.energy for one in found], np.float64),
        forces=np.concatenate([np.zeros((0, 3)), *(one.forces for one in found)]),
        stress=np.array([one.stress for one in found]).reshape(-1, 3, 3),
        atomic_energies=np.concatenate([np.zeros(0), *(one.atomic_energies for one in found)]),
        charge=np.array([one.charge for one in found], np.int64),
        spin_multiplicity=np.array([one.spin_multiplicity for one in found], np.int64),
        kind=np.zeros(n_frames, np.uint8),
        unit=np.ones(n_frames, np.uint8),
        formula_hash=formula_hashes(n_atoms, numbers),
    )
    return Chunk(
        frames=frames,
        unusable=Counter(error.code for error in errors),
        examples={error.code: str(error) for error in reversed(errors)},
        spoiled=Counter(f"{label} not finite" for one in found for label in one.spoiled),
    )


def _corpus_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in CORPUS_ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StructureError(
            f"{path} is no corpus file: {error}",
            code="UnreadableSource",
            hint=f"expected an .npz with {', '.join(CORPUS_ARRAYS)}",
        ) from None


def _pairs(kind: np.ndarray, pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the frames with pairs side by side, and the unit of every frame (in file order)."""
    place = np.arange(len(kind))
    units = np.ones(len(kind), np.uint8)
    plus = {int(pair[k]): k for k in np.flatnonzero((kind == PLUS) & (pair >= 0)).tolist()}
    for k in np.flatnonzero((kind == MINUS) & (pair >= 0)).tolist():
        partner = plus.pop(int(pair[k]), None)
        if partner is not None:
            place[k] = place[partner]
            units[partner], units[k] = 2, 0
    return np.lexsort((units == 0, place)), units


def _cuts(units: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of about CHUNK frames that part no unit."""
    ends = np.append(np.flatnonzero(units), len(units))
    start = 0
    while start < len(units):
        wanted = min(start + CHUNK, len(units))
        end = int(ends[np.searchsorted(ends, wanted)])
        yield start, end
        start = end
