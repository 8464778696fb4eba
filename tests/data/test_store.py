"""The store: bitwise round trips, shards, interrupted conversions, and damage that is noticed."""

import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest

from coset.data.audit import summary, verify
from coset.data.convert import PLAN, ConvertSettings, convert, split_store
from coset.data.formula import SYMBOLS, held_out
from coset.data.sources import Chunk, Source, store_source
from coset.data.store import MANIFEST, Frames, Store, StoreWriter, join_frames
from coset.errors import CheckpointError, ConfigError, StructureError
from tests.data.labelled import make_frames, same

KINDS = ("first", "second")


def write(path, frames: Frames, **options) -> Store:
    writer = StoreWriter(path, kinds=KINDS, facts={"note": "for a test"}, **options)
    writer.append(frames)
    return Store(writer.finish())


def source_of(*chunks: Frames, name: str = "memory", kinds=KINDS) -> Source:
    facts = {kind: {"license": f"license of {kind}"} for kind in kinds}
    pieces = [Chunk(frames=frames) for frames in chunks]
    return Source(
        name=name,
        sha256="0" * 64,
        kinds=tuple(kinds),
        chunks=lambda: iter(pieces),
        kind_facts=facts,
    )


def files_of(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def assert_same(found: Frames, expected: Frames, *, positions: str = "f4") -> None:
    """Bitwise, after the rounding that the format says; everything else is float64 or whole."""
    single = {"positions": positions}
    single |= dict.fromkeys(("forces", "atomic_energies", "stress", "cell"), "f4")
    for field in fields(Frames):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert same(a, b, single.get(field.name)), field.name


@pytest.mark.parametrize("wide", [False, True])
def test_frames_come_back_bit_for_bit(tmp_path, wide):
    frames = make_frames(30)
    store = write(tmp_path / "store", frames, wide=wide)
    assert len(store) == 30
    assert_same(store.read(np.arange(30)), frames, positions="f8" if wide else "f4")
    rows = np.array([7, 0, 29, 7])
    assert_same(store.read(rows), frames.take(rows), positions="f8" if wide else "f4")
    assert verify(tmp_path / "store") == []


def test_index_says_what_the_records_hold(tmp_path):
    frames = make_frames(24)
    index = write(tmp_path / "store", frames).index()
    first = np.cumsum(frames.n_atoms) - frames.n_atoms
    norms = np.linalg.norm(frames.forces, axis=1)
    largest = np.maximum.reduceat(norms, first)
    assert same(index["max_force"], largest, "f4")
    assert (index["offset"] % 8 == 0).all()
    labels = {1: frames.energy, 2: frames.forces[first, 0], 4: frames.stress[:, 0, 0]}
    labels |= {8: frames.atomic_energies[first]}
    for bit, values in labels.items():
        assert ((index["flags"] & bit != 0) == np.isfinite(values)).all()
    assert ((index["flags"][:, None] & [16, 32, 64] != 0) == frames.pbc).all()


def test_an_isolated_atom_alone(tmp_path):
    one = make_frames(1)
    assert one.n_atoms.tolist() == [1]
    store = write(tmp_path / "store", one)
    assert_same(store.read(np.array([0])), one)


def test_shards_change_nothing_and_never_part_units(tmp_path):
    frames = make_frames(60, units=True)
    whole = write(tmp_path / "whole", frames)
    parted = write(tmp_path / "parted", frames, shard_bytes=1500)
    assert len(parted.manifest["shards"]) > 5
    rows = np.random.default_rng(0).permutation(60)
    assert_same(parted.read(rows), whole.read(rows))
    starts = np.flatnonzero(parted.index()["offset"] == 0)
    assert (parted.index()["unit"][starts] > 0).all()
    assert verify(tmp_path / "parted") == []
    assert max(f.stat().st_size for f in (tmp_path / "parted").glob("*.bin")) <= 1500


def test_chunks_change_nothing(tmp_path):
    frames = make_frames(40, units=True)
    pieces = [frames.take(np.arange(a, b)) for a, b in ((0, 3), (3, 30), (30, 40))]
    convert([source_of(frames)], tmp_path / "one", ConvertSettings(shard_bytes=2000))
    convert([source_of(*pieces)], tmp_path / "three", ConvertSettings(shard_bytes=2000))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path, calls):
    frames = make_frames(80, units=True)
    chunks = [frames.take(np.arange(a, a + 6)) for a in range(0, 78, 6)]
    sources = [source_of(*chunks[:7], name="a"), source_of(*chunks[7:], name="b")]
    settings = ConvertSettings(split="train", shard_bytes=900, shifts={"O": -1.0})
    reference = convert(sources, tmp_path / "whole", settings)
    left = calls

    def kill(done: int, n_frames: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sources, tmp_path / "killed", settings, kill)
    assert not (tmp_path / "killed" / MANIFEST).exists()
    with pytest.raises(ConfigError, match="no finished store"):
        Store(tmp_path / "killed")
    # as if the machine had stopped while a shard was written
    n_shards = len(list((tmp_path / "killed").glob("*.bin")))
    (tmp_path / "killed" / f"shard-{n_shards:05d}.npy").write_bytes(b"half")
    (tmp_path / "killed" / f".shard-{n_shards:05d}.bin.new-0123").write_bytes(b"half")
    report = convert(sources, tmp_path / "killed", settings)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert replace(report, resumed=0) == reference
    assert report.resumed > 0 or calls == 1


def test_another_conversion_is_not_continued(tmp_path):
    frames = make_frames(40)
    chunks = [frames.take(np.arange(a, a + 10)) for a in range(0, 40, 10)]

    def stop(done: int, n_frames: int) -> None:
        if n_frames >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([source_of(*chunks)], tmp_path, ConvertSettings(shard_bytes=900), stop)
    for settings in (ConvertSettings(shard_bytes=900, split="train"), ConvertSettings()):
        with pytest.raises(ConfigError, match="another conversion") as error:
            convert([source_of(*chunks)], tmp_path, settings)
        assert error.value.code == "OtherConversion"
    convert([source_of(*chunks)], tmp_path, ConvertSettings(shard_bytes=900))
    assert not (tmp_path / PLAN).exists()
    with pytest.raises(ConfigError, match="finished store"):
        convert([source_of(*chunks)], tmp_path, ConvertSettings(shard_bytes=900))


def test_every_frame_is_written_or_counted(tmp_path):
    frames = make_frames(30)
    energy, forces, stress = frames.energy.copy(), frames.forces.copy(), frames.stress.copy()
    positions, numbers, charge = frames.positions.copy(), frames.numbers.copy(), frames.charge
    ends = np.cumsum(frames.n_atoms)
    energy[[0, 6]] = np.inf, np.nan
    forces[ends[6] - frames.n_atoms[6] : ends[6]] = np.nan
    stress[[4, 6]] = np.nan
    stress[5] = 1.0  # not periodic in three directions
    stress[8, 0, 1] = np.nan
    forces[ends[9] - 1, 2] = np.nan
    positions[ends[10] - 1] = np.nan
    numbers[ends[11] - 1] = 0
    charge = np.where(np.arange(30) == 12, 40_000, charge)
    broken = replace(
        frames, energy=energy, forces=forces, stress=stress, positions=positions,
        numbers=numbers, charge=charge,
    )  # fmt: skip
    report = convert([source_of(broken)], tmp_path / "store")
    assert report.skipped == {
        "no usable label": 2,  # 6, and 13 as it was made
        "NonFiniteInput": 1,
        "GhostAtom": 1,
        "BadCharge": 1,
    }
    assert report.read == 30 == report.written + report.skipped.total()
    assert report.dropped_labels == {
        "energy not finite": 1,
        "forces not finite": 1,
        "stress not finite": 1,
        "stress, not periodic in 3D": 1,
    }
    store = Store(tmp_path / "store")
    found = store.read(np.arange(len(store)))
    assert np.isnan(found.energy[0])
    assert np.isnan(found.stress[[5, 7]]).all()
    assert np.isnan(found.forces[ends[8] - ends[6] + ends[5] :][: frames.n_atoms[9]]).all()
    assert store.manifest["skipped"] == dict(report.skipped)
    assert verify(tmp_path / "store") == []


def test_a_broken_unit_stands_alone(tmp_path):
    frames = make_frames(12, units=True)
    positions = frames.positions.copy()
    positions[0] = np.nan  # the first of the unit (0, 1)
    convert([source_of(replace(frames, positions=positions))], tmp_path / "store")
    assert Store(tmp_path / "store").index()["unit"].tolist() == [1, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert verify(tmp_path / "store") == []


def test_parts_of_a_split_share_no_formula_and_lose_nothing(tmp_path):
    frames = make_frames(200)
    store = write(tmp_path / "all", frames, wide=True)
    train, valid = split_store(tmp_path / "all", tmp_path / "train", tmp_path / "valid", 0.3)
    parts = [Store(tmp_path / name) for name in ("train", "valid")]
    hashes = [set(part.index()["formula_hash"].tolist()) for part in parts]
    assert not hashes[0] & hashes[1]
    assert train.written + valid.written == train.read - train.skipped["no usable label"]
    held = held_out(frames.formula_hash, 0.3)
    labelled = np.isin(np.arange(200), np.flatnonzero(_labelled(frames)))
    for part, mine in zip(parts, (~held, held), strict=True):
        rows = np.flatnonzero(mine & labelled)
        assert_same(part.read(np.arange(len(part))), store.read(rows), positions="f8")
        assert part.manifest["split"]["held_out"] == 0.3
    default = ConvertSettings(split="valid")
    convert([store_source(tmp_path / "all")], tmp_path / "bucket", default)
    assert (Store(tmp_path / "bucket").index()["formula_hash"] % 10 == 0).all()


def _labelled(frames: Frames) -> np.ndarray:
    first = np.cumsum(frames.n_atoms) - frames.n_atoms
    labels = frames.energy, frames.forces[first, 0], frames.stress[:, 0, 0]
    return np.any([np.isfinite(label) for label in labels], axis=0)


def test_stores_can_be_joined_and_keep_their_licenses(tmp_path):
    frames = make_frames(12)
    for name, kinds in (("a", ("first", "second")), ("b", ("second", "third"))):
        convert([source_of(frames, kinds=kinds)], tmp_path / name)
    other = source_of(frames.take(np.zeros(0, np.int64)), kinds=("third",))
    other = replace(other, kind_facts={"third": {"license": "another"}})
    sources = [*(store_source(tmp_path / name) for name in ("a", "b")), other]
    convert(sources, tmp_path / "both")
    store = Store(tmp_path / "both")
    assert store.kinds == ["first", "second", "third"]
    assert [kind["license"] for kind in store.manifest["kinds"]] == [
        "license of first",
        "license of second",
        "license of third; another",
    ]
    found = store.read(np.arange(24))
    moved = replace(frames, kind=frames.kind + 1)
    assert_same(found, join_frames([frames, moved]))
    assert [s["sources"][0]["name"] for s in store.manifest["sources"][:2]] == ["memory"] * 2
    many = source_of(frames, kinds=[str(k) for k in range(257)])
    with pytest.raises(ConfigError, match="257 kinds, at most 256"):
        convert([many], tmp_path / "many")


def test_shifts_move_energies_by_the_number_of_atoms(tmp_path):
    frames = make_frames(20)
    convert([source_of(frames)], tmp_path / "store", ConvertSettings(shifts={"Fe": -0.25, "H": 2}))
    found = Store(tmp_path / "store").read(np.arange(20 - 1))
    kept = frames.take(np.flatnonzero(_labelled(frames)))
    frame = np.repeat(np.arange(len(kept)), kept.n_atoms)
    per_atom = -0.25 * (kept.numbers == 26) + 2.0 * (kept.numbers == 1)
    moved = np.bincount(frame, per_atom)
    assert np.allclose(found.energy, kept.energy + moved, rtol=0, atol=1e-12, equal_nan=True)
    assert same(found.atomic_energies, kept.atomic_energies + per_atom, "f4")
    with pytest.raises(ConfigError, match="Xx"):
        ConvertSettings(shifts={"Xx": 1.0})
    with pytest.raises(ConfigError, match="share"):
        ConvertSettings(held_out=1.5)


def test_nothing_to_write_is_an_error(tmp_path):
    frames = make_frames(5)
    none = ConvertSettings(split="valid", held_out=0.0)
    with pytest.raises(StructureError, match="not in the valid part") as error:
        convert([source_of(frames)], tmp_path / "store", none)
    assert error.value.code == "EmptyStore"
    convert([source_of(frames)], tmp_path / "store")  # nothing was begun


def test_summary_counts(tmp_path):
    frames = make_frames(40, units=True)
    report = convert([source_of(frames)], tmp_path / "store", ConvertSettings(shard_bytes=2000))
    facts = summary(tmp_path / "store")
    kept = frames.take(np.flatnonzero(_labelled(frames)))
    assert facts["structures"] == len(kept) == report.written
    assert facts["atoms"] == int(kept.n_atoms.sum())
    assert facts["labels"]["energy"] == np.isfinite(kept.energy).sum()
    periodic = kept.pbc.sum(axis=1)
    assert facts["periodic_directions"] == {str(n): (periodic == n).sum() for n in (3, 2, 1, 0)}
    frame = np.repeat(np.arange(len(kept)), kept.n_atoms)
    for symbol, count in facts["elements"].items():
        atoms = kept.numbers == SYMBOLS.index(symbol)
        assert count == {"structures": len(set(frame[atoms])), "atoms": atoms.sum()}
    assert sum(kind["structures"] for kind in facts["kinds"]) == len(kept)
    assert facts["licenses"] == ["license of first", "license of second"]
    sizes = [f.stat().st_size for f in (tmp_path / "store").glob("shard-*")]
    assert facts["bytes"] == sum(sizes)
    first = np.cumsum(kept.n_atoms) - kept.n_atoms
    largest = np.maximum.reduceat(np.linalg.norm(kept.forces, axis=1), first)
    assert facts["max_force_eV_per_A"]["p50"] == pytest.approx(np.nanmedian(largest), abs=1e-6)


# Damage


@pytest.fixture
def stored(tmp_path):
    convert([source_of(make_frames(40))], tmp_path / "store", ConvertSettings(shard_bytes=4000))
    return tmp_path / "store"


def test_every_flipped_bit_is_found(stored):
    rng = np.random.default_rng(0)
    for file in (stored / "shard-00000.bin", stored / "shard-00001.npy"):
        sound = file.read_bytes()
        for place in rng.integers(0, len(sound), 12).tolist():
            damaged = bytearray(sound)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            problems = verify(stored)
            assert problems
            assert re.search("sha256|is no index|damaged", problems[0])
        file.write_bytes(sound)
    assert verify(stored) == []


def test_the_damaged_record_is_named(stored):
    store = Store(stored)
    file = stored / "shard-00000.bin"
    damaged = bytearray(file.read_bytes())
    damaged[int(store.index()["offset"][3]) + 9] ^= 4
    file.write_bytes(damaged)
    assert Store(stored).damaged(np.arange(len(store))).tolist() == [3]
    assert "record 3 is damaged (crc32)" in verify(stored)


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.npy"])
def test_a_truncated_or_missing_file_is_noticed_at_once(stored, name):
    content = (stored / name).read_bytes()
    (stored / name).write_bytes(content[:-1])
    with pytest.raises(ConfigError, match="bytes, expected") as error:
        Store(stored)
    assert error.value.code == "StoreCorrupt"
    assert "bytes, expected" in verify(stored)[0]
    (stored / name).unlink()
    assert "None bytes" in verify(stored)[0]


def test_values_that_disagree_are_found_whatever_the_checksums_say(tmp_path):
    """As a faulty writer would leave them."""
    frames = make_frames(8)
    wrong = replace(frames, formula_hash=frames.formula_hash + 1)
    write(tmp_path / "formula", wrong)
    assert len([p for p in verify(tmp_path / "formula") if "formula" in p]) == 8
    positions = frames.positions.copy()
    positions[0] = np.nan
    write(tmp_path / "positions", replace(frames, positions=positions))
    assert verify(tmp_path / "positions") == ["record 0: positions are not finite"]
    write(tmp_path / "unit", replace(frames, unit=np.array([1, 1, 3, 0, 1, 1, 1, 1], np.uint8)))
    assert "units of records are broken" in verify(tmp_path / "unit")[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m | {"structures": 3}, "miscounts structures"),
        (lambda m: m | {"atoms": 3}, "miscounts atoms"),
        (lambda m: m | {"kinds": m["kinds"][::-1]}, "miscounts kinds"),
        (lambda m: m | {"elements": {"H": {"structures": 1, "atoms": 1}}}, "miscounts elements"),
        (lambda m: m | {"shards": ["../elsewhere"]}, "damaged"),
        (lambda m: {k: v for k, v in m.items() if k != "files"}, "damaged"),
        (lambda m: m | {"format": 99}, "format 99"),
    ],
)
def test_a_changed_manifest_is_noticed(stored, change, says):
    manifest = json.loads((stored / MANIFEST).read_text())
    (stored / MANIFEST).write_text(json.dumps(change(manifest)))
    assert any(says in problem for problem in verify(stored))


def test_what_is_no_store_says_so(tmp_path, stored):
    with pytest.raises(ConfigError, match="no finished store") as error:
        verify(tmp_path / "nothing")
    assert error.value.code == "StoreNotFound"
    (stored / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        Store(stored)
    assert verify(stored)
