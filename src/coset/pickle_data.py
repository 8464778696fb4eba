"""Pickles read as data: a stack machine that has no instruction to import or call anything.

A pickle is a program, and the usual unpicklers obey it. This one knows the 32 instructions that
build dicts, lists, tuples, numbers and text. The eleven global names below are inert labels that
are compared, never looked up, so a hostile file can at most be refused. Time and memory are bounded
by the size of the pickle and by the number of instructions.
"""

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from coset.errors import CheckpointError
from coset.strict_json import corrupt

MAX_PICKLE_BYTES = 64 << 20
MAX_INSTRUCTIONS = 4_000_000
MAX_DIMENSIONS = 8
MAX_PLAIN_ITEMS, MAX_PLAIN_DEPTH, MAX_TEXT = 10_000, 8, 100_000
NONSENSE = (IndexError, KeyError, TypeError, ValueError, AttributeError, DeprecationWarning)
"""What reading raises where a pickle has no meaning (the warning: where warnings are errors)."""

STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ByteStorage": torch.uint8,
}
RECORDS = {
    "torch ScriptObject",
    "metatrain.utils.data.dataset DatasetInfo",
    "metatrain.utils.data.target_info TargetInfo",
}
SETS = {"builtins set", "__builtin__ set"}
REBUILD, ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
GLOBALS = {*STORAGES, *RECORDS, *SETS, REBUILD, ORDERED}


@dataclass(frozen=True, slots=True)
class Label:
    """A global name in a pickle: never looked up, only compared with the names above."""

    name: str


@dataclass(slots=True)
class Record:
    """The attributes of an object of a class that this package does not have."""

    name: str
    state: Any = None


class StorageRef(NamedTuple):
    """A member of the zip file that holds `size` numbers."""

    dtype: torch.dtype
    key: str
    size: int


class TensorRef(NamedTuple):
    """Part of a storage, with shape and strides; read only when needed."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(data: bytes) -> object:
    """The dicts, lists, numbers, `Record`s and `TensorRef`s that a pickle describes.

    Raises:
        CheckpointError: code `UnsafePickle` for instructions and names that are not needed for
            data, `ModelCorrupt` for a pickle that makes no sense.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise _unsafe(f"{len(data):,} bytes, at most {MAX_PICKLE_BYTES:,} are read")
    machine, end = _Machine(), 0
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            action = ACTIONS.get(opcode.name)
            if action is None or count >= MAX_INSTRUCTIONS:
                raise _unsafe(f"instruction {opcode.name} at byte {position}")
            action(machine, argument)
            end = (position or 0) + 1
    except CheckpointError:
        raise
    except NONSENSE as error:
        raise corrupt(f"the pickle does not describe data: {error!s:.200}") from None
    if end != len(data):
        raise _unsafe(f"{len(data) - end} bytes behind its end")
    if len(machine.stack) != 1 or machine.below:
        raise corrupt("the pickle leaves an unfinished stack")
    return machine.stack[0]


def plain_data(value: object) -> Any:  # noqa: ANN401
    """A copy made of dicts, lists, text and numbers only, small enough to be printed and compared.

    A pickle may hold a nest of tuples in which each contains the next one twice: few bytes, but
    endless work for whoever compares or prints it. Here such a nest is refused.
    """
    left = MAX_PLAIN_ITEMS

    def copy(item: Any, depth: int) -> Any:  # noqa: ANN401
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_PLAIN_DEPTH:
            raise corrupt("the settings of the model are too large or too deep")
        if type(item) is dict:
            return {str(key): copy(value, depth + 1) for key, value in item.items()}
        if type(item) in (list, tuple):
            return [copy(value, depth + 1) for value in item]
        if type(item) is str:
            return "".join(c for c in item[:MAX_TEXT] if c.isprintable() or c == "\n")
        if item is None or type(item) in (bool, int, float):
            return item
        raise corrupt(f"the settings of the model hold a {type(item).__name__}")

    return copy(value, 0)


class _Machine:
    """The stack, and what instructions do to it."""

    def __init__(self) -> None:
        """An empty stack, no marks, nothing remembered."""
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, item: object) -> None:
        """Put one object on the stack."""
        self.stack.append(item)

    def pop(self, n: int) -> list[Any]:
        """The last n objects, taken off the stack."""
        if len(self.stack) < n:
            raise IndexError("stack is empty")
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def pop_mark(self) -> list[Any]:
        """Everything since the last mark, taken off the stack."""
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def mark(self) -> None:
        """Remember the height of the stack."""
        self.below.append(self.stack)
        self.stack = []

    def set_items(self, pairs: list[Any]) -> None:
        """Put alternating keys (text or whole numbers) and values into the dict on top."""
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(target) is not dict or type(key) not in (str, int):
                raise TypeError(f"{type(key).__name__} as a key of {type(target).__name__}")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top."""
        if type(self.stack[-1]) is not list:
            raise TypeError("append to what is no list")
        self.stack[-1].extend(items)

    def reduce(self) -> None:
        """Replace a label and its arguments by the data they stand for."""
        label, arguments = self.pop(2)
        name = label.name if type(label) is Label else ""
        if name == ORDERED and arguments == ():
            self.push({})
        elif name in SETS and type(arguments[0]) is list:
            self.push(arguments[0])
        elif name == REBUILD:
            self.push(_tensor_ref(*arguments[:4]))
        else:
            raise _unsafe(f"a call of {name or type(label).__name__}")

    def new(self) -> None:
        """Replace the label of a class by an empty record."""
        label, arguments = self.pop(2)
        if type(label) is not Label or label.name not in RECORDS or arguments != ():
            raise _unsafe("the construction of an object")
        self.push(Record(label.name))

    def build(self) -> None:
        """Set the attributes of a record; those of an ordered dict are of no interest."""
        (state,) = self.pop(1)
        target = self.stack[-1]
        if type(target) is Record:
            target.state = state
        elif type(target) is not dict:
            raise _unsafe(f"attributes of {type(target).__name__}")

    def label(self, name: str) -> None:
        """Push one of the known names."""
        if name not in GLOBALS:
            raise _unsafe(f"the name {name!r:.120}")
        self.push(Label(name))

    def storage(self) -> None:
        """Replace a persistent id by the storage it names."""
        (pid,) = self.pop(1)
        kind, label, key, _, size = pid
        dtype = STORAGES[label.name]
        if kind != "storage" or type(key) is not str or type(size) is not int or size < 0:
            raise ValueError("a persistent id that names no storage")
        self.push(StorageRef(dtype, key, size))


Action = Callable[[_Machine, Any], object]
ACTIONS: dict[str, Action] = {
    "PROTO": lambda m, version: _check_protocol(version),
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: m.mark(),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop(3))),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new(),
    "BUILD": lambda m, _: m.build(),
    "GLOBAL": lambda m, name: m.label(name),
    "BINPERSID": lambda m, _: m.storage(),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
        lambda m, value: m.push(value),
    ),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, i: m.memo.update({i: m.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, i: m.push(m.memo[i])),
}
"""Pickle instructions (protocol 2) and what they do here."""


def _tensor_ref(storage: Any, offset: Any, shape: Any, strides: Any) -> TensorRef:  # noqa: ANN401
    """Part of a storage, after checking that it lies inside and holds no element twice."""
    numbers = (offset, *shape, *strides)
    if type(storage) is not StorageRef or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor without storage, or with a negative size")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count and (last >= storage.size or count > storage.size):
        raise ValueError(f"a tensor of shape {shape} outside its storage of {storage.size}")
    return TensorRef(storage, offset, tuple(shape), tuple(strides))


def _check_protocol(version: int) -> None:
    if version != 2:
        raise _unsafe(f"protocol {version}, expected 2")


def _unsafe(what: str) -> CheckpointError:
    return CheckpointError(
        f"refused to read the pickle: {what}",
        code="UnsafePickle",
        hint="a metatrain checkpoint needs nothing of the kind; do not trust this file",
    )
