"""Hostile and damaged model files: none may run anything, none may load as something else.

Every hostile pickle tries to write a marker file; an audit hook also records processes, sockets,
imports and writes while a file is read.
"""

import io
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_checkpoints import (
    SCRIPT_OBJECT,
    Call,
    Instance,
    Name,
    Persistent,
    Storages,
    encode,
    pickle_bytes,
    small_checkpoint,
    tensor_map,
    torch_zip,
    upstream_checkpoint,
    upstream_hypers,
    upstream_state,
    zip_of,
)

from coset import catalog
from coset.checkpoint import MANIFEST, WEIGHTS, load_checkpoint, manifest_digest, save_checkpoint
from coset.errors import CheckpointError
from coset.metatrain_import import import_metatrain
from coset.pickle_data import MAX_INSTRUCTIONS, read_pickle

RISKY = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "exec")
watching: list[list[str]] = []


def _audit(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event == "import" or event.startswith(RISKY):
        watching[-1].append(f"{event} {arguments!r:.200}")


sys.addaudithook(_audit)


@pytest.fixture
def marker(tmp_path):
    """A file that exists afterwards only if something was executed; also nothing risky happened."""
    path = tmp_path / "executed"
    events: list[str] = []
    watching.append(events)
    yield path
    watching.remove(events)
    assert not path.exists()
    assert not [e for e in events if str(tmp_path) not in e], events


def refuse(read, *arguments):
    """The error with which `read` refuses its arguments."""
    with pytest.raises(CheckpointError) as error:
        read(*arguments)
    return error.value


def refuse_file(tmp_path, data, name="evil.ckpt"):
    """The error with which the importer and the catalog refuse a file."""
    path = tmp_path / name
    watching.append([])  # the write of the test itself is not of interest
    path.write_bytes(data)
    watching.pop()
    error = refuse(import_metatrain, path)
    assert refuse(catalog.load_model, path).code == error.code
    return error


def short(text):
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def evil_pickles(marker):
    """Pickles that execute something in an ordinary unpickler, or try to."""
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    text = encode(command, Storages())
    code_text = encode(code, Storages())
    call = text + b"\x85R"
    proto, stop = b"\x80\x02", b"."
    storage = Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", 1))
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    ordered = Name("collections", "OrderedDict")
    good = pickle_bytes({"a": 1})

    def glob(module, name):
        return f"c{module}\n{name}\n".encode()

    system = glob("os", "system") + call
    yield "global os.system", proto + system + stop
    yield "posix system", proto + glob("posix", "system") + call + stop
    yield "protocol 0", b"cos\nsystem\n(S'" + command.encode() + b"'\ntR."
    yield "protocol 1", b"cos\nsystem\n(" + text + b"tR."
    yield "INST", proto + b"(" + text + b"ios\nsystem\n."
    yield "OBJ", proto + b"(" + glob("os", "system") + text + b"o."
    yield "stack global", b"\x80\x04" + short("os") + short("system") + b"\x93" + call + stop
    framed = short("os") + short("system") + b"\x93" + call + stop
    yield "framed", b"\x80\x04\x95" + struct.pack("<Q", len(framed)) + framed
    yield "huge frame", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + framed
    yield "dotted name", proto + glob("torch", "os.system") + call + stop
    yield "dotted allowed name", proto + glob("torch._utils", "_rebuild_tensor_v2.__globals__") + stop
    yield "dotted allowed module", proto + glob("collections.abc", "OrderedDict") + stop
    yield "name with a space", proto + b"ccollections OrderedDict\n\n" + stop
    for name in ("eval", "exec", "__import__", "getattr", "open", "compile", "breakpoint"):
        yield f"builtins {name}", proto + glob("builtins", name) + code_text + b"\x85R" + stop
        yield f"old {name}", proto + glob("__builtin__", name) + code_text + b"\x85R" + stop
    for module, name in (
        ("subprocess", "Popen"),
        ("runpy", "_run_code"),
        ("importlib", "import_module"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.serialization", "load"),
        ("torch.jit", "load"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "QInt8Storage"),
        ("numpy", "load"),
        ("pickle", "loads"),
        ("pip", "main"),
        ("ctypes", "CDLL"),
        ("metatrain.utils.data.dataset", "Dataset"),
    ):
        yield f"{module} {name}", proto + glob(module, name) + call + stop
    yield "nested", pickle_bytes({"a": [{"b": ({"c": Call(Name("os", "system"), (command,))},)}]})
    yield "as a key", proto + b"}" + system + b"K\x01s."
    yield "memo", proto + glob("os", "system") + b"q\x00" + b"0" + b"h\x00" + call + stop
    yield "memo of nothing", proto + b"h\x07."
    yield "memoize", b"\x80\x04" + glob("os", "system") + b"\x94" + call + stop
    for code in (b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"):
        yield f"extension {code[0]:#x}", proto + code + call + stop
    yield "next buffer", b"\x80\x05\x97" + stop
    yield "out of band", b"\x80\x05\x97\x98" + stop
    yield "stacked", good + proto + system + stop
    yield "trailing bytes", good + b"\x00"
    yield "two on the stack", proto + b"NN."
    yield "open mark", proto + b"(N."
    yield "nothing", b""
    yield "no stop", good[:-1]
    yield "empty stack", proto + stop
    yield "pop", proto + b"N0N."
    yield "text persistent id", proto + b"P" + command.encode() + b"\n."
    yield "build a name", proto + glob("torch", "ScriptObject") + b"}b."
    yield "build a tuple", proto + b"(K\x01t}b."
    yield "build with slots", pickle_bytes(Instance(Name("os", "_wrap_close"), (None, {"x": 1})))
    yield "reduce a record class", pickle_bytes(Call(SCRIPT_OBJECT, (command,)))
    yield "reduce a storage class", pickle_bytes(Call(Name("torch", "FloatStorage"), (4,)))
    yield "reduce text", proto + text + b")R."
    yield "reduce a record", pickle_bytes(Call(Instance(SCRIPT_OBJECT, None), ()))
    yield "new tensor", proto + glob("torch._utils", "_rebuild_tensor_v2") + b")\x81."
    yield "new with arguments", proto + glob("torch", "ScriptObject") + text + b"\x85\x81."
    yield "keywords", b"\x80\x04" + glob("torch", "ScriptObject") + b")}\x92."
    yield "ordered dict of pairs", pickle_bytes(Call(ordered, ([(1, 2)],)))
    yield "append to a dict", proto + b"}K\x01a."
    yield "items of a list", proto + b"]K\x01K\x02s."
    yield "odd items", proto + b"}(K\x01u."
    yield "tuple as a key", pickle_bytes({(1, 2): 3})
    yield "dict as a key", proto + b"}}K\x01s."
    yield "wrong persistent kind", pickle_bytes(Persistent(("module", *storage.pid[1:])))
    yield "short persistent id", pickle_bytes(Persistent(storage.pid[:4]))
    yield "persistent text", pickle_bytes(Persistent("storage"))
    yield "persistent type", pickle_bytes(Persistent(("storage", "FloatStorage", "0", "cpu", 1)))
    yield "persistent wrong label", pickle_bytes(Persistent(("storage", ordered, "0", "cpu", 1)))
    yield "persistent path", pickle_bytes(Persistent((*storage.pid[:2], 3, "cpu", 1)))
    yield "negative storage", pickle_bytes(Persistent((*storage.pid[:4], -1)))
    for what, arguments in {
        "no storage": ("0", 0, (1,), (1,)),
        "negative offset": (storage, -1, (1,), (1,)),
        "offset outside": (storage, 1, (1,), (1,)),
        "size outside": (storage, 0, (2,), (1,)),
        "negative size": (storage, 0, (-1,), (1,)),
        "negative stride": (storage, 0, (1,), (-1,)),
        "stride outside": (storage, 0, (1, 2), (1, 2**31 - 1)),
        "repeated elements": (storage, 0, (2**31 - 1, 2**31 - 1), (0, 0)),
        "too many dimensions": (storage, 0, (1,) * 9, (1,) * 9),
        "dimensions differ": (storage, 0, (1,), ()),
        "float size": (storage, 0, (1.0,), (1,)),
        "bool size": (storage, 0, (True,), (1,)),
        "too few": (storage, 0),
    }.items():
        yield f"tensor with {what}", pickle_bytes(Call(rebuild, arguments))
    yield "very deep", proto + b"]" * 100_000 + b"a" * 99_998 + b"a"
    yield "too many instructions", proto + b"N" * (MAX_INSTRUCTIONS + 2) + stop


NAMES = [name for name, _ in evil_pickles("x")]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_execute_nothing(tmp_path, marker, name):
    data = dict(evil_pickles(marker))[name]
    error = refuse(read_pickle, data)
    assert error.code in ("UnsafePickle", "ModelCorrupt")
    if name != "too many instructions":  # once is enough
        error = refuse_file(tmp_path, zip_of({"a/data.pkl": data, "a/version": b"3"}))
        assert error.code in ("UnsafePickle", "ModelCorrupt")


def test_the_corpus_is_large_and_distinct():
    assert len(NAMES) == len(set(NAMES)) >= 85


def test_the_hostile_pickles_would_execute_if_they_were_run(tmp_path):
    """A control: the corpus holds real attacks; the first one names os.system and its command."""
    first = next(evil_pickles(tmp_path / "executed"))[1]
    assert b"cos\nsystem\n" in first
    assert f"touch {tmp_path / 'executed'}".encode() in first


def test_nested_tuples_cannot_hang_the_reader(tmp_path, marker):
    """Sixty tuples, each holding the one before twice: 2^60 items for whoever prints or hashes."""
    nest = b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    assert type(read_pickle(b"\x80\x02" + nest + b".")) is tuple
    for path in (("architecture_name",), ("model_ckpt_version",), ("model_data", "model_hypers")):
        checkpoint = upstream_checkpoint(small_checkpoint())
        table = checkpoint
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = "NEST"
        data = pickle_bytes(checkpoint).replace(encode("NEST", Storages()), nest)
        refuse_file(tmp_path, zip_of({"a/data.pkl": data}))
    refuse(read_pickle, b"\x80\x02}" + nest + b"K\x01s.")
    refuse(read_pickle, b"\x80\x02" + nest + b"Q.")


def test_a_safe_checkpoint_is_still_read(tmp_path, marker):
    watching.append([])
    (tmp_path / "good.ckpt").write_bytes(torch_zip(upstream_checkpoint(small_checkpoint())))
    watching.pop()
    assert import_metatrain(tmp_path / "good.ckpt").provenance.name == "Fake"


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
    for change in (members["archive/data/5"][:-1], members["archive/data/5"] + bytes(4), b""):
        refuse_file(tmp_path, zip_of({**members, "archive/data/5": change}))
    refuse_file(tmp_path, zip_of({k: v for k, v in members.items() if k != "archive/data/5"}))
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


def test_flipped_bits_are_refused_or_change_no_number(tmp_path, marker, good_zip):
    """Foreign files state no digest of the whole, but every member has a checksum."""
    rng = np.random.default_rng(0)
    path = tmp_path / "good.ckpt"
    watching.append([])
    path.write_bytes(good_zip)
    good = import_metatrain(path)
    refused = 0
    for bit in rng.integers(0, 8 * len(good_zip), 300):
        changed = bytearray(good_zip)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(changed))
        try:
            read = import_metatrain(path)
        except CheckpointError:
            refused += 1
            continue
        assert read.hypers == good.hypers
        assert (read.baseline, read.scales) == (good.baseline, good.scales)
        assert all(torch.equal(read.weights[n], t) for n, t in good.weights.items())
    watching.pop()
    assert refused > 200


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
    [b"", b"\x1f\x8b\x08", b"\x80\x02N.", b"\x80\x04N.", b'{"format": 1}', b"PK\x03\x04", bytes(999),
     b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b"ustar"],
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
    rng = np.random.default_rng(1)
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
    first, second = b"combination_norms.0.weight", b"combination_norms.1.weight"
    swapped = data.replace(first, b"?").replace(second, first).replace(b"?", second)
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
    (entry("config", "zbl"), 1),
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
    other = save_checkpoint(small_checkpoint(), path.with_name("other"))
    (path / WEIGHTS).write_bytes(data)

    def change(manifest):
        manifest["sha256"][WEIGHTS] = __import__("hashlib").sha256(data).hexdigest()
        manifest["sha256"]["tensors"] = {n: _digest(t) for n, t in tensors.items()}

    sign(path, change)
    return other


def _digest(tensor):
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return __import__("hashlib").sha256(raw).hexdigest()


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
    sign(model, lambda m: m["sha256"].update({WEIGHTS: __import__("hashlib").sha256(data).hexdigest()}))
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
    rng = np.random.default_rng(2)
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


def test_upstream_settings_are_not_evaluated(tmp_path, marker):
    command = f"__import__('os').system('touch {marker}')"
    hypers = upstream_hypers(small_checkpoint().hypers) | {"cutoff": command}
    refuse_file(tmp_path, torch_zip(upstream_checkpoint(small_checkpoint(), hypers=hypers)))
