"""Pickles that would run something: none may, and all must be refused.

Every hostile pickle tries to write a marker file; an audit hook also records processes, sockets,
imports and writes while a file is read.
"""

import itertools
import pickle  # security: allowed, the control that the corpus is real
import struct

import pytest
from fake_checkpoints import (
    Call,
    Instance,
    Name,
    Persistent,
    Storages,
    encode,
    pickle_bytes,
    small_checkpoint,
    torch_zip,
    upstream_checkpoint,
    upstream_hypers,
    zip_of,
)
from refusal import refuse, refuse_file, unwatched

from coset import pickle_data
from coset.metatrain_import import import_metatrain
from coset.pickle_data import read_pickle

PROTO, STOP = b"\x80\x02", b"."
RECORD, ORDERED = Name("torch", "ScriptObject"), Name("collections", "OrderedDict")
REBUILD, FLOATS = Name("torch._utils", "_rebuild_tensor_v2"), Name("torch", "FloatStorage")
STORAGE = Persistent(("storage", FLOATS, "0", "cpu", 1))
BUILTINS = ("eval", "exec", "__import__", "getattr", "open", "compile", "breakpoint")
NAMES_THAT_RUN_THINGS = (
    ("posix", "system"),
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
    ("torch", "os.system"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("collections.abc", "OrderedDict"),
    ("collections", "OrderedDict.fromkeys"),
    ("collections OrderedDict", ""),
    ("", "collections OrderedDict"),
)


def short(text):
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def names(marker):
    """Calls of everything that a pickle could call."""
    text = encode(f"touch {marker}", Storages())
    code = encode(f"open({str(marker)!r}, 'w')", Storages())
    for module in ("builtins", "__builtin__"):
        for name in BUILTINS:
            called = encode(Name(module, name), Storages()) + code + b"\x85R"
            yield f"{module} {name}", PROTO + called + STOP
    for module, name in NAMES_THAT_RUN_THINGS:
        called = encode(Name(module, name), Storages()) + text + b"\x85R"
        yield f"{module} {name}", PROTO + called + STOP


def instructions(marker):
    """os.system by every instruction that can reach it."""
    command = f"touch {marker}"
    text = encode(command, Storages())
    function, call = b"cos\nsystem\n", text + b"\x85R"
    framed = short("os") + short("system") + b"\x93" + call + STOP
    yield "global", PROTO + function + call + STOP
    yield "protocol 0", b"cos\nsystem\n(S'" + command.encode() + b"'\ntR."
    yield "protocol 1", function + b"(" + text + b"tR."
    yield "inst", PROTO + b"(" + text + b"ios\nsystem\n."
    yield "obj", PROTO + b"(" + function + text + b"o."
    yield "stack global", b"\x80\x04" + framed
    yield "framed", b"\x80\x04\x95" + struct.pack("<Q", len(framed)) + framed
    yield "huge frame", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + framed
    yield "memo", PROTO + function + b"q\x000h\x00" + call + STOP
    yield "memoize", b"\x80\x04" + function + b"\x94" + call + STOP
    yield "as a key", PROTO + b"}" + function + call + b"K\x01s."
    yield "nested", pickle_bytes({"a": [{"b": ({"c": Call(Name("os", "system"), (command,))},)}]})
    yield "behind the end", pickle_bytes({"a": 1}) + PROTO + function + call + STOP
    yield "text persistent id", PROTO + b"P" + command.encode() + b"\n."
    yield "build", pickle_bytes(Instance(Name("os", "_wrap_close"), (None, {"x": 1})))
    yield "keywords", b"\x80\x04" + encode(RECORD, Storages()) + b")}\x92."
    for extension in (b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"):
        yield f"extension {extension[0]:#x}", PROTO + extension + call + STOP


def misuse(_marker):
    """Allowed names and instructions, used for what they are not for."""
    record, rebuild = encode(RECORD, Storages()), encode(REBUILD, Storages())
    yield "build a name", PROTO + record + b"}b."
    yield "build a tuple", PROTO + b"(K\x01t}b."
    yield "reduce a record class", pickle_bytes(Call(RECORD, ("x",)))
    yield "reduce a storage class", pickle_bytes(Call(FLOATS, (4,)))
    yield "reduce text", PROTO + short("x").replace(b"\x8c\x01", b"X\x01\x00\x00\x00") + b")R."
    yield "reduce a record", pickle_bytes(Call(Instance(RECORD, None), ()))
    yield "reduce without arguments", PROTO + rebuild + b"NR."
    yield "new tensor", PROTO + rebuild + b")\x81."
    yield "new with arguments", PROTO + record + b"K\x01\x85\x81."
    yield "ordered dict of pairs", pickle_bytes(Call(ORDERED, ([(1, 2)],)))
    yield "append to a dict", PROTO + b"}K\x01a."
    yield "items of a list", PROTO + b"]K\x01K\x02s."
    yield "odd items", PROTO + b"}(K\x01u."
    yield "tuple as a key", pickle_bytes({(1, 2): 3})
    yield "dict as a key", PROTO + b"}}K\x01s."
    yield "next buffer", b"\x80\x05\x97."
    yield "read-only buffer", b"\x80\x05\x97\x98."
    yield "memo of nothing", PROTO + b"h\x07."
    yield "pop", PROTO + b"N0N."
    yield "trailing byte", pickle_bytes({"a": 1}) + b"\x00"
    yield "two on the stack", PROTO + b"NN."
    yield "open mark", PROTO + b"(N."
    yield "nothing", b""
    yield "no stop", pickle_bytes({"a": 1})[:-1]
    yield "empty stack", PROTO + STOP
    yield "very deep", PROTO + b"]" * 20_000 + b"a" * 19_999


def storages(_marker):
    """Persistent ids and tensors that reach beyond their storage."""
    kind, label, key, place, size = STORAGE.pid
    for what, pid in {
        "kind": ("module", label, key, place, size),
        "length": (kind, label, key, place),
        "text": "storage",
        "text type": (kind, "FloatStorage", key, place, size),
        "label": (kind, ORDERED, key, place, size),
        "key": (kind, label, 3, place, size),
        "negative": (kind, label, key, place, -1),
        "float": (kind, label, key, place, 1.0),
    }.items():
        yield f"persistent {what}", pickle_bytes(Persistent(pid))
    for what, arguments in {
        "no storage": ("0", 0, (1,), (1,)),
        "negative offset": (STORAGE, -1, (1,), (1,)),
        "offset outside": (STORAGE, 1, (1,), (1,)),
        "size outside": (STORAGE, 0, (2,), (1,)),
        "negative size": (STORAGE, 0, (-1,), (1,)),
        "negative stride": (STORAGE, 0, (1,), (-1,)),
        "stride outside": (STORAGE, 0, (1, 2), (1, 2**31 - 1)),
        "repeated elements": (STORAGE, 0, (2**31 - 1, 2**31 - 1), (0, 0)),
        "nine dimensions": (STORAGE, 0, (1,) * 9, (1,) * 9),
        "missing stride": (STORAGE, 0, (1,), ()),
        "float size": (STORAGE, 0, (1.0,), (1,)),
        "bool size": (STORAGE, 0, (True,), (1,)),
        "too few": (STORAGE, 0),
    }.items():
        yield f"tensor with {what}", pickle_bytes(Call(REBUILD, arguments))


def corpus(marker):
    """All of them."""
    return dict(
        itertools.chain(*(part(marker) for part in (names, instructions, misuse, storages)))
    )


@pytest.mark.parametrize("name", corpus("x"))
def test_hostile_pickles_run_nothing(tmp_path, marker, name):
    data = corpus(marker)[name]
    error = refuse(read_pickle, data)
    assert error.code in ("UnsafePickle", "ModelCorrupt")
    assert refuse_file(tmp_path, zip_of({"a/data.pkl": data, "a/version": b"3"})).code == error.code


def test_the_corpus_is_large():
    assert len(corpus("x")) >= 95


@pytest.mark.parametrize("name", ["global", "protocol 0", "inst", "obj", "stack global", "memo"])
def test_an_ordinary_unpickler_runs_them(tmp_path, name):
    """The control: these files do what they claim, so refusing them means something."""
    marker = tmp_path / "executed"
    pickle.loads(corpus(marker)[name])  # security: allowed, the control of this very test
    assert marker.exists()


def test_the_number_of_instructions_and_the_size_are_bounded(monkeypatch):
    data = PROTO + b"(" + b"N" * 100 + b"t" + STOP
    monkeypatch.setattr(pickle_data, "MAX_INSTRUCTIONS", 104)
    assert read_pickle(data) == (None,) * 100
    monkeypatch.setattr(pickle_data, "MAX_INSTRUCTIONS", 103)
    assert refuse(read_pickle, data).code == "UnsafePickle"
    monkeypatch.setattr(pickle_data, "MAX_PICKLE_BYTES", len(data) - 1)
    assert refuse(read_pickle, data).code == "UnsafePickle"


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
    with unwatched():
        (tmp_path / "good.ckpt").write_bytes(torch_zip(upstream_checkpoint(small_checkpoint())))
    assert import_metatrain(tmp_path / "good.ckpt").provenance.name == "Fake"


def test_upstream_settings_are_not_evaluated(tmp_path, marker):
    command = f"__import__('os').system('touch {marker}')"
    hypers = upstream_hypers(small_checkpoint().hypers) | {"cutoff": command}
    refuse_file(tmp_path, torch_zip(upstream_checkpoint(small_checkpoint(), hypers=hypers)))
