"""JSON from files that may be damaged or hostile, turned into typed values or refused.

Doubled, missing and unknown keys, NaN, infinities and wrong types are errors that name the place.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from coset.errors import CheckpointError

Json = dict[str, Any]
T = TypeVar("T")

MAX_DEPTH = 64
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[][{}]', re.DOTALL)
"""Strings, so that brackets in them do not count, and brackets; linear also without an end."""

ACCEPTED: dict[object, tuple[type, ...]] = {
    bool: (bool,), int: (int,), float: (int, float), str: (str,), NoneType: (NoneType,),
}  # fmt: skip
"""JSON types that may fill a field of a Python type (a bool is no number here)."""


def corrupt(message: str) -> CheckpointError:
    """The error for a model file whose content contradicts itself."""
    return CheckpointError(
        message, code="ModelCorrupt", hint="the file is damaged or was edited; get it again"
    )


def parse_json(data: bytes, what: str) -> Json:
    """A JSON object; `what` names it in errors.

    Raises:
        CheckpointError: doubled keys, NaN, infinities, numbers that overflow to them, no object.
    """
    try:
        text = data.decode()
        refuse_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except ValueError as error:
        raise corrupt(f"{what} is not strict JSON: {error}") from None
    return as_object(value, what)


def as_object(value: object, where: str) -> Json:
    """`value` if it is a JSON object."""
    if type(value) is not dict:
        raise corrupt(f"{where} is {value!r:.60}, expected a JSON object")
    return value


def as_dataclass(kind: type[T], value: object, where: str) -> T:
    """The dataclass `kind` from a JSON object that has exactly its fields."""
    table = as_object(value, where)
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    check_keys(table, names, where)
    return kind(**{name: as_type(hints[name], table[name], f"{where}.{name}") for name in names})


def as_type(hint: object, value: object, where: str) -> object:
    """`value` if JSON of its type may fill a field annotated with `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        fitting = (a for a in arguments if (a is NoneType) == (value is None))
        return as_type(next(fitting, arguments[0]), value, where)
    if is_dataclass(hint):
        return as_dataclass(cast("type[object]", hint), value, where)
    if origin is tuple and type(value) is list:
        return tuple(as_type(arguments[0], item, where) for item in value)
    if origin is Mapping and type(value) is dict:
        return {key: as_type(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal and value not in arguments:
        raise corrupt(f"{where} = {value!r:.60}, expected one of {', '.join(map(str, arguments))}")
    if type(value) not in ACCEPTED.get(str if origin is Literal else hint, ()):
        raise corrupt(f"{where} = {value!r:.60} has the wrong type, expected {hint}")
    return float(cast("float", value)) if hint is float else value


def check_keys(found: Iterable[Any], expected: Iterable[Any], what: str) -> None:
    """Refuse anything but exactly the expected keys, suggesting what a wrong one may have meant."""
    have, want = set(found), set(expected)
    if have == want:
        return
    message = f"{what}: missing {some(want - have) or 'nothing'}"
    if extra := have - want:
        message += f", unknown {some(extra)}"
        if close := difflib.get_close_matches(min(map(str, extra)), map(str, want), n=1):
            message += f"; did you mean {close[0]!r}?"
    raise corrupt(message)


def some(names: Iterable[object]) -> str:
    """A few of the names and how many more there are."""
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def refuse_depth(text: str) -> None:
    """Nesting is counted here: Python's own limit on it can be lifted by any other package."""
    depth = 0
    for token in _BRACKETS.findall(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value
