"""Damaged, edited and foreign model files: none may load as something else.

An audit hook records processes, sockets, imports and writes while a file is read.
"""

import contextlib
import hashlib
import io
import json
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from fake_checkpoints import (
    Call,
    Name,
    Persistent,
    pickle_bytes,
    small_checkpoint,
    tensor_map,
    torch_zip,
    upstream_checkpoint,
    upstream_state,
    zip_of,
)
from numpy.random import default_rng
from refusal import refuse, refuse_file, watching
from safetensors.torch import save as safetensors_bytes

from coset import catalog
from coset.checkpoint import MANIFEST, WEIGHTS, load_checkpoint, manifest_digest, save_checkpoint
from coset.errors import CheckpointError
from coset.metatrain_import import import_metatrain
from coset.strict_json import parse_json

# Zip files


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def good_zip():
    return torch_zip(upstream_checkpoint(small_checkpoint()))


def test_compressed_members_are_refused(tmp_path, marker, good_zip):
    data = zip_of(members_of(good_zip), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in str(refuse_file(tmp_path, data))


def test_a_zip_bomb_is_refused_without_unpacking(tmp_path, marker):
    bomb = zip_of({"a/data.pkl": bytes(200 << 20)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    refuse_file(tmp_path, bomb)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "archive/../../evil", "archive\\..\\evil", "C:\\evil", "other/version",
     "archive/evil.py", "archive/data/1x", "archive/data/../version"],
)  # fmt: skip
def test_strange_member_names_are_refused(tmp_path, marker, good_zip, name):
    before = set(tmp_path.rglob("*"))
    refuse_file(tmp_path, zip_of({**members_of(good_zip), name: b"x"}))
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "evil.ckpt"}


def test_doubled_members_are_refused(tmp_path, marker, good_zip):
    buffer = io.BytesIO(good_zip)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickle_bytes(Call(Name("os", "system"), ("x",))))
    assert "twice" in str(refuse_file(tmp_path, buffer.getvalue()))


def patched(data, offset_in_entry, layout, value):
    """A zip file with one field of the first entry of its central directory changed."""
    start = data.index(b"PK\x01\x02")
    changed = bytearray(data)
    struct.pack_into(layout, changed, start + offset_in_entry, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [(8, "<H", 1), (10, "<H", 8), (20, "<I", 5), (24, "<I", 5), (24, "<I", 2**31), (42, "<I", 40)],
    ids=["encrypted", "method", "packed size", "size", "huge size", "overlap"],
)
def test_a_dishonest_directory_is_refused(tmp_path, marker, good_zip, offset, layout, value):
    refuse_file(tmp_path, patched(good_zip, offset, layout, value))


def test_storages_of_another_size_are_refused(tmp_path, marker, good_zip):
    members = members_of(good_zip)
    last = f"archive/data/{len(members) - 4}"  # one of the tensors that are read
    for change in (members[last][:-1], members[last] + bytes(4), b""):
        refuse_file(tmp_path, zip_of({**members, last: change}))
    refuse_file(tmp_path, zip_of({k: v for k, v in members.items() if k != last}))
    refuse_file(tmp_path, zip_of({**members, "archive/byteorder": b"big"}))


def test_one_storage_cannot_be_read_a_thousand_times(tmp_path, marker):
    """Tensors that share a large storage would cost its size each time."""
    big = Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", 1 << 20))
    layout = (0, (1,), (1,), False, Call(Name("collections", "OrderedDict"), ()))
    view = Call(Name("torch._utils", "_rebuild_tensor_v2"), (big, *layout))
    checkpoint = upstream_checkpoint(small_checkpoint())
    state = {f"backend.{i}": view for i in range(1000)}
    checkpoint |= {"model_state_dict": state, "best_model_state_dict": state}
    checkpoint["model_data"]["dataset_info"].state["targets"] = {}
    data = zip_of({"a/data.pkl": pickle_bytes(checkpoint), "a/data/0": bytes(4 << 20)})
    assert "storage 0" in str(refuse_file(tmp_path, data))


def test_truncated_files_are_refused(tmp_path, marker, good_zip):
    for cut in range(0, len(good_zip), max(1, len(good_zip) // 100)):
        refuse_file(tmp_path, good_zip[:cut])


def test_flipped_bits_are_refused_or_change_no_number(tmp_path, good_zip):
    """Foreign files state no digest of the whole, but every member has a checksum."""
    rng = default_rng(0)
    path = tmp_path / "good.ckpt"
    path.write_bytes(good_zip)
    good = catalog.load_model(path)
    start = good_zip.index(b"PK\x01\x02")  # half of the flips in the directory of the zip file
    bits = [*rng.integers(0, 8 * start, 60), *rng.integers(8 * start, 8 * len(good_zip), 60)]
    refused = 0
    for bit in bits:
        changed = bytearray(good_zip)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(changed))
        try:
            read = catalog.load_model(path)
        except CheckpointError:
            refused += 1
            continue
        assert read.hypers == good.hypers
        assert (read.baseline, read.scales) == (good.baseline, good.scales)
        assert all(torch.equal(read.weights[n], t) for n, t in good.weights.items())
    assert refused > 60


def test_any_byte_of_the_pickle_may_be_wrong(tmp_path, good_zip):
    """With valid checksums, as an attacker would write it: refused, or an ordinary model."""
    rng = default_rng(3)
    members = members_of(good_zip)
    data = members["archive/data.pkl"]
    for position, value in zip(rng.integers(0, len(data), 150), rng.bytes(150), strict=True):
        changed = bytearray(data)
        changed[position] = value
        (tmp_path / "m.ckpt").write_bytes(zip_of({**members, "archive/data.pkl": bytes(changed)}))
        with contextlib.suppress(CheckpointError):
            catalog.load_model(tmp_path / "m.ckpt")


def test_arrays_with_objects_or_false_sizes_are_refused(tmp_path, marker):
    def broken(array_bytes):
        good = members_of(bytes(tensor_map(("t",), [(-1,)], np.ones((1, 1))).numpy()))
        values = {**good, "blocks/0/values.npy": array_bytes}
        return torch.frombuffer(bytearray(zip_of(values)), dtype=torch.uint8)

    def npy(header, body=b"", magic=b"\x93NUMPY\x01\x00"):
        return magic + struct.pack("<H", len(header)) + header.encode() + body

    code = f"__import__('os').system('touch {marker}')"
    for data in (
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }", b"cos\nsystem\n."),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**12, 1), }"),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 1), }", bytes(8)),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, -1), }", bytes(8)),
        npy("{'descr': '<f8', 'fortran_order': True, 'shape': (1, 1), }", bytes(8)),
        npy(code),
        npy("{" * 500),
        npy("", magic=b"\x93NUMPY\x09\x00"),
        b"",
    ):
        state = upstream_state(small_checkpoint())
        state["scaler.energy_scaler_buffer"] = broken(data)
        checkpoint = upstream_checkpoint(small_checkpoint(), state=state)
        assert refuse_file(tmp_path, torch_zip(checkpoint)).code == "ModelCorrupt"


# Files of another kind


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"m/constants.pkl": b"", "m/code/__torch__.py": b"", "m/data.pkl": b""}, "TorchScript"),
        ({"m/data/aotinductor/model/x.so": b"", "m/archive_format": b"pt2"}, "compiled"),
        ({"model.cubin": b""}, "compiled"),
    ],
)
def test_programs_are_recognized_and_refused(tmp_path, marker, members, message):
    error = refuse_file(tmp_path, zip_of(members), "model.pt")
    assert error.code == "ModelForeign"
    assert message in str(error)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b\x08", b"\x80\x02N.", b"\x80\x04N.", b'{"format": 1}', b"PK\x03\x04",
     bytes(999), b"<html>404</html>", b"version https://git-lfs\n", b"ustar"],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, marker, data):
    assert refuse_file(tmp_path, data).code in ("ModelForeign", "ModelCorrupt")


def test_half_a_model_and_missing_files_are_refused(tmp_path):
    path = save_checkpoint(small_checkpoint(), tmp_path / "m")
    for name in (MANIFEST, WEIGHTS):
        assert str(tmp_path / "m") in refuse(catalog.load_model, path / name).hint
    assert refuse(import_metatrain, tmp_path / "none.ckpt").code == "ModelNotFound"
    assert refuse(import_metatrain, tmp_path).code == "ModelNotFound"


# Our own format


@pytest.fixture
def model(tmp_path):
    return save_checkpoint(small_checkpoint(), tmp_path / "m")


def sign(path, change):
    """Edit the manifest and give it a valid digest again."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    if type(manifest.get("sha256")) is dict:
        manifest["sha256"][MANIFEST] = manifest_digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_every_flipped_bit_is_detected(model, name):
    rng = default_rng(1)
    good, reference = (model / name).read_bytes(), load_checkpoint(model)
    positions = rng.integers(0, 8 * len(good), 500)
    for bit in positions:
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << (bit % 8)
        (model / name).write_bytes(bytes(changed))
        try:
            read = load_checkpoint(model)
        except CheckpointError as error:
            assert error.code in ("ModelCorrupt", "ModelTooNew")  # noqa: PT017
            continue
        # Only white space may change unseen, and the order of nothing.
        assert name == MANIFEST
        assert json.loads(bytes(changed)) == json.loads(good)
        assert read.provenance == reference.provenance


def test_damaged_tensors_are_named(model):
    data = bytearray((model / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (model / WEIGHTS).write_bytes(bytes(data))
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    last = max((v["data_offsets"][1], k) for k, v in header.items() if k != "__metadata__")[1]
    assert last in str(refuse(load_checkpoint, model))


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_every_truncation_is_detected(model, name):
    good = (model / name).read_bytes()
    for cut in range(0, len(good) - 1, max(1, len(good) // 200)):
        (model / name).write_bytes(good[:cut])
        assert refuse(load_checkpoint, model).code == "ModelCorrupt"
    (model / name).write_bytes(good + b"x")
    assert refuse(load_checkpoint, model).code == "ModelCorrupt"


def test_swapped_tensor_names_are_detected(model):
    data = (model / WEIGHTS).read_bytes()
    first, second, other = (f"combination_norms.{i}.weight".encode() for i in "012")
    swapped = data.replace(first, other).replace(second, first).replace(other, second)
    assert len(swapped) == len(data)
    (model / WEIGHTS).write_bytes(swapped)
    assert "combination_norms" in str(refuse(load_checkpoint, model))


def test_edited_numbers_are_detected(model):
    text = (model / MANIFEST).read_text()
    (model / MANIFEST).write_text(text.replace("-1.6", "-1.7"))
    assert "changed" in str(refuse(load_checkpoint, model))


def entry(*path):
    """A function that sets one entry of a manifest (a missing value removes it)."""

    def change(manifest, value):
        table = manifest
        for key in path[:-1]:
            table = table[key]
        if value is ...:
            table.pop(path[-1])
        else:
            table[path[-1]] = value

    return change


EDITS = [
    (entry("config", "cutoff", "cutoff"), -1.0),
    (entry("config", "cutoff", "cutoff"), 0),
    (entry("config", "cutoff", "cutoff"), 1e300),
    (entry("config", "cutoff", "cutoff"), "5.0"),
    (entry("config", "cutoff", "cutoff"), True),
    (entry("config", "cutoff", "cutoff"), None),
    (entry("config", "cutoff", "cutoff"), [5.0]),
    (entry("config", "cutoff", "width"), 99.0),
    (entry("config", "cutoff", "adaptive"), "fixed"),
    (entry("config", "cutoff", "adaptive"), "newest"),
    (entry("config", "cutoff", "adaptive"), 3),
    (entry("config", "cutoff", "n_neighbors"), None),
    (entry("config", "cutoff", "n_neighbors"), -3.0),
    (entry("config", "cutoff", "n_neighbors"), "many"),
    (entry("config", "cutoff", "function"), "__import__('os')"),
    (entry("config", "cutoff", "extra"), 1),
    (entry("config", "cutoff", "function"), ...),
    (entry("config", "cutoff"), None),
    (entry("config", "cutoff"), []),
    (entry("config", "network", "n_gnn_layers"), 10**9),
    (entry("config", "network", "n_gnn_layers"), 3),
    (entry("config", "network", "n_gnn_layers"), 0),
    (entry("config", "network", "n_gnn_layers"), -2),
    (entry("config", "network", "n_attention_layers"), 10**30),
    (entry("config", "network", "d_pet"), 10**12),
    (entry("config", "network", "d_pet"), 16_384),
    (entry("config", "network", "d_pet"), 4.0),
    (entry("config", "network", "d_node"), 0),
    (entry("config", "network", "n_heads"), 3),
    (entry("config", "network", "activation"), "relu"),
    (entry("config", "network", "attention_temperature"), 0.0),
    (entry("config", "network", "attention_temperature"), 1e999),
    (entry("config", "conditioning"), {"max_charge": 1}),
    (entry("config", "conditioning"), {"max_charge": 1, "max_spin_multiplicity": 1}),
    (entry("config", "conditioning"), 0),
    (entry("config", "numerics"), "coset"),
    (entry("config", "norm_eps"), 1e-5),
    (entry("config", "zbl"), True),
    (entry("config", "zbl"), ...),
    (entry("config"), None),
    (entry("atomic_types"), []),
    (entry("atomic_types"), [1, 1, 8]),
    (entry("atomic_types"), [1, 8, 200]),
    (entry("atomic_types"), [1.0, 8, 29]),
    (entry("atomic_types"), {"1": 2}),
    (entry("atomic_types"), list(range(1, 119))),
    (entry("targets"), {}),
    (entry("targets"), []),
    (entry("targets", "energy"), {}),
    (entry("targets", "energy", "unit"), "Ha"),
    (entry("targets", "energy", "rank"), 1),
    (entry("targets", "energy", "quantity"), "direct_forces"),
    (entry("targets", "energy", "quantity"), ["energy"]),
    (entry("targets", "energy", "level_of_theory"), None),
    (entry("targets", "other"), {}),
    (entry("units", "energy"), "kcal/mol"),
    (entry("units"), ...),
    (entry("baseline", "energy"), {"1": 0.0}),
    (entry("baseline", "energy"), {"1": 0.0, "8": 0.0, "29": "0"}),
    (entry("baseline", "energy"), {"1": 0.0, "8": 0.0, "029": 0.0}),
    (entry("baseline", "energy"), {"1": 0.0, "8": 0.0, "-1": 0.0}),
    (entry("baseline", "energy"), {"1": 0.0, "8": 0.0, "Cu": 0.0}),
    (entry("baseline", "energy"), []),
    (entry("baseline"), ...),
    (entry("scales", "energy"), -1.0),
    (entry("scales", "energy"), [1.0, 2.0, 3.0]),
    (entry("scales", "energy"), ["1"]),
    (entry("scales", "energy"), {}),
    (entry("scales", "energy"), ...),
    (entry("provenance", "name"), 3),
    (entry("provenance", "class"), "os.system"),
    (entry("provenance", "citation"), [1]),
    (entry("provenance", "training_run"), {"a": 1}),
    (entry("card"), []),
    (entry("sha256", "tensors"), {}),
    (entry("sha256", "tensors"), []),
    (entry("sha256", WEIGHTS), "0" * 64),
    (entry("sha256", WEIGHTS), None),
    (entry("sha256", "more"), 1),
    (entry("sha256"), "x"),
    (entry("created"), 3),
    (entry("coset_version"), ...),
    (entry("architecture"), "mace"),
    (entry("format"), 0),
    (entry("format"), "1"),
    (entry("format"), True),
    (entry("format"), 1.0),
    (entry("format"), ...),
    (entry("__class__"), "os.system"),
]


@pytest.mark.parametrize(("change", "value"), EDITS)
def test_edited_manifests_are_refused_before_anything_is_allocated(model, change, value):
    sign(model, lambda manifest: change(manifest, value))
    assert refuse(load_checkpoint, model).code == "ModelCorrupt"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", "{", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": Infinity}',
     '{"a": -Infinity}', '{"a": 1e999}', "{'a': 1}", '{"a": 1,}', "[" * 100_000, '{"a":' * 100_000,
     '{"format": ' + "9" * 5000 + "}", "\ufeff{}", '{"format": 1}', '{"format": 1, "sha256": {}}'],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(model, text):
    (model / MANIFEST).write_text(text)
    assert refuse(load_checkpoint, model).code == "ModelCorrupt"


def test_bytes_that_are_no_text_are_refused(model):
    (model / MANIFEST).write_bytes(b"\xff\xfe{}")
    assert refuse(load_checkpoint, model).code == "ModelCorrupt"


def reweigh(path, tensors):
    """Write other tensors with valid digests."""
    data = safetensors_bytes(tensors)
    (path / WEIGHTS).write_bytes(data)

    def change(manifest):
        manifest["sha256"][WEIGHTS] = hashlib.sha256(data).hexdigest()
        manifest["sha256"]["tensors"] = {n: _digest(t) for n, t in tensors.items()}

    sign(path, change)


def _digest(tensor):
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("name", "tensor", "code"),
    [
        ("edge_embedder.weight", torch.full((3, 4), float("nan")), "NonFiniteWeights"),
        ("edge_embedder.weight", torch.full((3, 4), float("inf")), "NonFiniteWeights"),
        ("edge_embedder.weight", torch.ones(4, 3), "ModelCorrupt"),
        ("edge_embedder.weight", torch.ones(3, 4, dtype=torch.float64), "ModelCorrupt"),
        ("edge_embedder.weight", torch.ones(3, 4, dtype=torch.bfloat16), "ModelCorrupt"),
        ("edge_embedder.weight", torch.ones(3, 4, dtype=torch.int64), "ModelCorrupt"),
        ("edge_embedder.weight", torch.ones(3, 4, dtype=torch.bool), "ModelCorrupt"),
        ("another.weight", torch.ones(3, 4), "ModelCorrupt"),
        ("llpr.covariance", torch.full((2, 2), float("nan")), "NonFiniteWeights"),
    ],
)
def test_other_tensors_with_valid_digests_are_refused(model, name, tensor, code):
    reweigh(model, {**small_checkpoint().weights, name: tensor})
    error = refuse(load_checkpoint, model)
    assert error.code == code
    assert name in str(error) or "dtype" in str(error)


def crafted(header, body=b""):
    text = header if type(header) is bytes else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200 << 20) + b"{}",
        crafted(b"{"),
        crafted(b"[]"),
        crafted({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        crafted({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)),
        crafted({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        crafted({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        crafted({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, bytes(4)),
        crafted({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        crafted({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}}, bytes(4)),
    ],
)
def test_crafted_weight_files_are_refused(model, data):
    (model / WEIGHTS).write_bytes(data)
    sign(model, lambda m: m["sha256"].update({WEIGHTS: hashlib.sha256(data).hexdigest()}))
    assert refuse(load_checkpoint, model).code == "ModelCorrupt"


def test_zipped_models_follow_the_same_rules(tmp_path):
    path = save_checkpoint(small_checkpoint(), tmp_path / "m.zip")
    good = path.read_bytes()
    for data in (
        zip_of(members_of(good), compression=zipfile.ZIP_DEFLATED),
        zip_of({**members_of(good), "extra": b""}),
        zip_of({MANIFEST: members_of(good)[MANIFEST]}),
        good[:-1],
        good[: len(good) // 2],
    ):
        path.write_bytes(data)
        assert refuse(load_checkpoint, path).code == "ModelCorrupt"
    rng = default_rng(2)
    reference = small_checkpoint()
    for bit in rng.integers(0, 8 * len(good), 300):
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(changed))
        try:
            read = load_checkpoint(path)
        except CheckpointError:
            continue
        assert all(torch.equal(read.weights[n], t) for n, t in reference.weights.items())
        assert (read.baseline, read.scales) == (reference.baseline, reference.scales)


def test_reading_our_format_opens_nothing_else(model, tmp_path):
    events: list[str] = []
    watching.append(events)
    load_checkpoint(model)
    watching.pop()
    assert events == []


def test_nesting_is_limited_whatever_other_packages_allow():
    """A package that lifts the limit of recursion must not let a file crash the interpreter."""
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(1_000_000)
        for text in ("[" * 1_000_000, '{"a":' * 1_000_000):
            with pytest.raises(CheckpointError, match="nested more than"):
                parse_json(text.encode(), "manifest")
    finally:
        sys.setrecursionlimit(limit)
    assert len(parse_json(b'{"a": "' + b"[" * 1000 + b'"}', "manifest")["a"]) == 1000
