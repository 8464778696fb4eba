"""The packed store: labelled structures in a few large memory-mapped files, nothing to run.

A store is a directory:

    manifest.json       units, kinds with their licenses, split rule, bytes and sha256 of every file
    shard-00000.bin     records, one after another, each 8-byte aligned
    shard-00000.npy     index: one row of `INDEX` per record

A record is little-endian:

    energy f8 | charge i2, spin i2 | stress f4[6] xx yy zz yz xz xy | cell f4[9] |
    positions f4[3n] (f8 if flagged) | forces f4[3n] | atomic_energies f4[n] if flagged |
    numbers u1[n] | zeros to a multiple of 8

Units: eV, Å, eV/Å, eV/Å³ (positive in tension). A label that is missing is NaN and its flag is off.
A shard appears under its final name only when it is complete, so a killed conversion goes on where
it stopped.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from coset.atomic_files import write_file
from coset.errors import ConfigError
from coset.strict_json import parse_json

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = np.dtype(
    [
        ("offset", "<u8"),
        ("crc32", "<u4"),
        ("formula_hash", "<u4"),
        ("n_atoms", "<u4"),
        ("max_force", "<f4"),
        ("flags", "<u2"),
        ("kind", "u1"),
        ("unit", "u1"),
    ]
)
"""unit: records that belong together, counted at the first of them (1: alone), 0 at the others."""

HAS_ENERGY, HAS_FORCES, HAS_STRESS, HAS_ATOMIC_ENERGIES = 1, 2, 4, 8
PERIODIC = (16, 32, 64)
WIDE_POSITIONS = 128
HEADER_WORDS = 18
VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
SHARD_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """Labelled structures in flat arrays: S frames with A atoms in all.

    positions [A, 3] and cell [S, 3, 3] in Å, energy [S] in eV, forces [A, 3] in eV/Å, stress
    [S, 3, 3] in eV/Å³, atomic_energies [A] in eV; what is missing is NaN. kind, unit, formula_hash
    as in `INDEX`.
    """

    n_atoms: np.ndarray
    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray
    atomic_energies: np.ndarray
    charge: np.ndarray
    spin_multiplicity: np.ndarray
    kind: np.ndarray
    unit: np.ndarray
    formula_hash: np.ndarray

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.n_atoms)

    def take(self, rows: np.ndarray) -> "Frames":
        """The given frames, in the given order."""
        atoms = spans(np.cumsum(self.n_atoms) - self.n_atoms, self.n_atoms, rows)
        picked = {
            field.name: getattr(self, field.name)[atoms if field.name in PER_ATOM else rows]
            for field in fields(self)
        }
        return Frames(**picked)


PER_ATOM = ("numbers", "positions", "forces", "atomic_energies")


def spans(first: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Concatenated ranges first[r] ... first[r] + lengths[r] - 1 for the given rows."""
    counts = lengths[rows].astype(np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    starts = first[rows].astype(np.int64) - (ends - counts)
    ranges: np.ndarray = np.arange(total) + np.repeat(starts, counts)
    return ranges


def join_frames(parts: Sequence[Frames]) -> Frames:
    """Consecutive frames as one."""
    names = [field.name for field in fields(Frames)]
    return Frames(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def encode(frames: Frames, *, wide: bool = False) -> tuple[list[bytes], np.ndarray]:
    """Records and their index rows (offsets counted from the first record)."""
    rows = np.zeros(len(frames), INDEX)
    ends = np.cumsum(frames.n_atoms)
    records, offset = [], 0
    for k, (end, n) in enumerate(zip(ends.tolist(), frames.n_atoms.tolist(), strict=True)):
        atoms = slice(end - n, end)
        record, flags = _record(frames, k, atoms, wide=wide)
        forces = frames.forces[atoms]
        largest = float(np.sqrt((forces.astype(np.float64) ** 2).sum(1).max())) if n else 0.0
        facts = frames.formula_hash[k], n, largest, flags, frames.kind[k], frames.unit[k]
        rows[k] = (offset, zlib.crc32(record), *facts)
        records.append(record)
        offset += len(record)
    return records, rows


def _record(frames: Frames, k: int, atoms: slice, *, wide: bool) -> tuple[bytes, int]:
    stress = np.array([frames.stress[k][i, j] for i, j in VOIGT], "<f4")
    atomic = frames.atomic_energies[atoms]
    flags = sum(bit for bit, on in zip(PERIODIC, frames.pbc[k].tolist(), strict=True) if on)
    flags |= HAS_ENERGY * bool(np.isfinite(frames.energy[k]))
    flags |= HAS_FORCES * bool(np.isfinite(frames.forces[atoms]).all())
    flags |= HAS_STRESS * bool(np.isfinite(stress).all())
    flags |= HAS_ATOMIC_ENERGIES * bool(np.isfinite(atomic).all())
    flags |= WIDE_POSITIONS * wide
    parts = [
        np.array(frames.energy[k], "<f8").tobytes(),
        np.array([frames.charge[k], frames.spin_multiplicity[k]], "<i2").tobytes(),
        stress.tobytes(),
        frames.cell[k].astype("<f4").tobytes(),
        frames.positions[atoms].astype("<f8" if wide else "<f4").tobytes(),
        frames.forces[atoms].astype("<f4").tobytes(),
        atomic.astype("<f4").tobytes() if flags & HAS_ATOMIC_ENERGIES else b"",
        frames.numbers[atoms].astype("u1").tobytes(),
    ]
    record = b"".join(parts)
    return record + b"\0" * (-len(record) % 8), flags


class StoreWriter:
    """Appends frames to a new store, or to one whose conversion was interrupted."""

    def __init__(
        self,
        path: str | Path,
        *,
        kinds: Sequence[str],
        facts: Mapping[str, Any],
        kind_facts: Mapping[str, Mapping[str, str]] | None = None,
        wide: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """kinds: names of the values of `Frames.kind`; facts: what else the manifest says.

        kind_facts: license and citation by kind. `facts` may be replaced until `finish`.
        """
        self.path = Path(path)
        if (self.path / MANIFEST).exists():
            hint = "choose another directory"
            raise ConfigError(f"{path} is a finished store", code="StoreExists", hint=hint)
        self.path.mkdir(parents=True, exist_ok=True)
        self.kinds, self.facts, self.wide, self.shard_bytes = list(kinds), facts, wide, shard_bytes
        self.kind_facts = kind_facts or {}
        for left_by_a_kill in self.path.glob(".shard-*.new-*"):
            left_by_a_kill.unlink()
        self.shards = [p.stem for p in sorted(self.path.glob("shard-*.bin"))]
        self.n_done = sum(len(self._index(name)) for name in self.shards)
        self._bytes = bytearray()
        self._rows: list[np.ndarray] = []

    def append(self, frames: Frames) -> None:
        """Add frames; a shard is closed when it is full (units are never parted)."""
        if not len(frames):
            return
        records, rows = encode(frames, wide=self.wide)
        starts = np.flatnonzero(rows["unit"]).tolist()
        for start, end in zip(starts, [*starts[1:], len(records)], strict=True):
            size = sum(len(record) for record in records[start:end])
            if self._bytes and len(self._bytes) + size > self.shard_bytes:
                self._close_shard()
            offsets = rows["offset"][start:end]
            rows["offset"][start:end] = offsets - offsets[0] + np.uint64(len(self._bytes))
            self._rows.append(rows[start:end])
            self._bytes += b"".join(records[start:end])

    def finish(self) -> Path:
        """Close the last shard and write the manifest."""
        if self._rows:
            self._close_shard()
        indices = [self._index(name) for name in self.shards]
        files = [self.path / f"{name}{end}" for name in self.shards for end in (".bin", ".npy")]
        counts = np.bincount(
            np.concatenate([np.zeros(0, np.uint8), *(i["kind"] for i in indices)]),
            minlength=len(self.kinds),
        )
        manifest = {
            "format": FORMAT,
            "units": {"energy": "eV", "length": "Å", "forces": "eV/Å", "stress": "eV/Å³"},
            "structures": int(sum(len(i) for i in indices)),
            "atoms": int(sum(int(i["n_atoms"].sum()) for i in indices)),
            "kinds": [
                {"name": name, "structures": int(n), **self.kind_facts.get(name, {})}
                for name, n in zip(self.kinds, counts, strict=True)
            ],
            "shards": self.shards,
            "files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files},
            **self.facts,
        }
        text = json.dumps(manifest, ensure_ascii=False, indent=1)
        write_file(self.path / MANIFEST, text.encode())
        return self.path

    def _index(self, name: str) -> np.ndarray:
        index: np.ndarray = np.load(self.path / f"{name}.npy", allow_pickle=False)
        return index

    def _close_shard(self) -> None:
        name = shard_name(len(self.shards))
        index = io.BytesIO()
        np.save(index, np.concatenate(self._rows), allow_pickle=False)
        write_file(self.path / f"{name}.npy", index.getvalue())
        write_file(self.path / f"{name}.bin", bytes(self._bytes))
        self.shards.append(name)
        self._bytes, self._rows = bytearray(), []


class Store:
    """A finished store, read through memory maps; nothing of its size is copied."""

    def __init__(self, path: str | Path) -> None:
        """Open it and check that the files have the sizes they should have.

        Raises:
            ConfigError: code `StoreNotFound`, `StoreTooNew` or `StoreCorrupt`.
        """
        self.path = Path(path)
        if not (self.path / MANIFEST).is_file():
            raise ConfigError(
                f"{path} is no finished store: {MANIFEST} not found",
                code="StoreNotFound",
                hint="coset data convert SOURCE -o DIR makes one",
            )
        self.manifest = parse_json((self.path / MANIFEST).read_bytes(), MANIFEST)
        if (found := self.manifest.get("format")) != FORMAT:
            raise ConfigError(f"{path} has format {found!r}, expected {FORMAT}", code="StoreTooNew")
        names = [shard_name(k) for k in range(len(self.manifest.get("shards", ())))]
        files = {f"{name}{end}" for name in names for end in (".bin", ".npy")}
        if self.manifest.get("shards") != names or set(self.manifest.get("files", ())) != files:
            raise ConfigError(f"{path}: {MANIFEST} is damaged", code="StoreCorrupt")
        for name, facts in self.manifest["files"].items():
            self._check_size(name, facts["bytes"])
        self.kinds: list[str] = [kind["name"] for kind in self.manifest["kinds"]]
        self._indices = [self._map(f"{name}.npy") for name in names]
        self._files = [np.memmap(self.path / f"{name}.bin", np.uint8, "r") for name in names]
        self._starts = np.cumsum([0, *(len(index) for index in self._indices)])

    def __len__(self) -> int:
        """Number of frames."""
        return int(self._starts[-1])

    @property
    def sha256(self) -> str:
        """Digest of the manifest, and through it of every file."""
        return sha256_of(self.path / MANIFEST)

    def index(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Index rows (all of them, or the given ones); offsets count from the start of a shard."""
        if rows is None:
            return np.concatenate([np.zeros(0, INDEX), *self._indices])
        picked = np.empty(len(rows), INDEX)
        for shard, places, local in self._by_shard(rows):
            picked[places] = self._indices[shard][local]
        return picked

    def read(self, rows: np.ndarray) -> Frames:
        """The given frames, in the given order."""
        parts, order = [], []
        for shard, places, local in self._by_shard(rows):
            parts.append(decode(self._files[shard], self._indices[shard][local]))
            order.append(places)
        if len(parts) == 1:
            return parts[0]
        return join_frames(parts).take(np.argsort(np.concatenate(order), kind="stable"))

    def damaged(self, rows: np.ndarray) -> np.ndarray:
        """Those of the given rows whose bytes do not have their checksum."""
        bad = []
        for shard, places, local in self._by_shard(rows):
            index, file = self._indices[shard], self._files[shard]
            for place, row in zip(places.tolist(), local.tolist(), strict=True):
                start = int(index["offset"][row])
                end = int(index["offset"][row + 1]) if row + 1 < len(index) else len(file)
                if zlib.crc32(file[start:end].tobytes()) != int(index["crc32"][row]):
                    bad.append(int(rows[place]))
        return np.array(sorted(bad), np.int64)

    def _by_shard(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, places in `rows`, rows of the shard) for every shard that occurs."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        return [
            (int(s), places, rows[places] - self._starts[s])
            for s in np.unique(shards)
            for places in (np.flatnonzero(shards == s),)
        ]

    def _map(self, name: str) -> np.ndarray:
        try:
            index: np.ndarray = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except (ValueError, SyntaxError, TokenError):  # of its header
            index = np.zeros(0)
        if index.dtype != INDEX:
            raise ConfigError(f"{self.path / name} is no index", code="StoreCorrupt")
        return index

    def _check_size(self, name: str, size: int) -> None:
        file = self.path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            message = f"{file} has {found} bytes, expected {size}"
            raise ConfigError(message, code="StoreCorrupt", hint="copy it anew")


def decode(file: np.ndarray, rows: np.ndarray) -> Frames:
    """Frames from the bytes of a shard and the index rows of the records, all at once."""
    words = file.view("<u4")
    n = rows["n_atoms"].astype(np.int64)
    start = (rows["offset"] // 4).astype(np.int64)
    flags = rows["flags"]
    every = np.arange(len(rows))
    header = words[start[:, None] + np.arange(HEADER_WORDS)]
    spin_charge = np.ascontiguousarray(header[:, 2]).view("<i2").reshape(-1, 2)
    stress6 = np.ascontiguousarray(header[:, 3:9]).view("<f4")
    stress = np.empty((len(rows), 3, 3), np.float32)
    for column, (i, j) in enumerate(VOIGT):
        stress[:, i, j] = stress[:, j, i] = stress6[:, column]
    wide = bool(len(rows)) and bool(flags[0] & WIDE_POSITIONS)
    width = 6 if wide else 3
    at = start + HEADER_WORDS
    positions = words[spans(at, width * n, every)]
    at = at + width * n
    forces = words[spans(at, 3 * n, every)]
    at = at + 3 * n
    has_atomic = (flags & HAS_ATOMIC_ENERGIES) != 0
    atomic = np.full(int(n.sum()), np.nan, np.float32)
    length = np.where(has_atomic, n, 0)
    atomic[np.repeat(has_atomic, n)] = words[spans(at, length, every)].view("<f4")
    numbers = file[spans(4 * (at + length), n, every)]
    return Frames(
        n_atoms=n,
        numbers=numbers,
        positions=positions.view("<f8" if wide else "<f4").reshape(-1, 3),
        cell=np.ascontiguousarray(header[:, 9:18]).view("<f4").reshape(-1, 3, 3),
        pbc=np.stack([(flags & bit) != 0 for bit in PERIODIC], axis=1),
        energy=np.ascontiguousarray(header[:, :2]).view("<f8")[:, 0],
        forces=forces.view("<f4").reshape(-1, 3),
        stress=stress,
        atomic_energies=atomic,
        charge=spin_charge[:, 0].astype(np.int64),
        spin_multiplicity=spin_charge[:, 1].astype(np.int64),
        kind=rows["kind"].copy(),
        unit=rows["unit"].copy(),
        formula_hash=rows["formula_hash"].copy(),
    )


def shard_name(number: int) -> str:
    """Name of the files of a shard, without their ends."""
    return f"shard-{number:05d}"


def record_bytes(rows: np.ndarray) -> np.ndarray:
    """Length of the record that each index row stands for."""
    n, flags = rows["n_atoms"].astype(np.int64), rows["flags"]
    per_atom = 12 + 1 + np.where(flags & WIDE_POSITIONS, 24, 12)
    per_atom = per_atom + np.where(flags & HAS_ATOMIC_ENERGIES, 4, 0)
    padded: np.ndarray = (4 * HEADER_WORDS + n * per_atom + 7) // 8 * 8
    return padded


def sha256_of(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
