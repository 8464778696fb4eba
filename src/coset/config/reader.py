"""Strict TOML: a file with its overrides becomes a checked table, or one line for every problem.

There is no interpolation, no inclusion and no environment variable: what counts is in the file and
in the overrides.
"""

import json
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from coset.errors import ConfigError

Json = dict[str, Any]
Table = TypeVar("Table", bound=BaseModel)

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a table",
    "float_type": "a number",
    "int_type": "an integer",
    "model_type": "a table",
    "string_type": "a string",
    "tuple_type": "a list",
}
"""Words for the errors of pydantic about types."""


def read_table(kind: type[Table], path: Path, overrides: Sequence[str] = ()) -> Table:
    """The table that a TOML file and `key=value` overrides describe.

    Raises:
        ConfigError: no file, no TOML, or keys and values that do not belong; one line each.
    """
    tables = _parse(path)
    for assignment in overrides:
        override(tables, assignment)
    # A list of TOML may fill a tuple, but no string may pass for a number: the rules of JSON.
    text = json.dumps(tables, default=str)
    try:
        return kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        schema, details = kind.model_json_schema(), error.errors(include_url=False)
    problems = [f"{path}: {_problem(one, schema)}" for one in details]
    raise ConfigError("\n".join(problems), field=_dotted(details[0]))


def override(tables: Json, assignment: str) -> None:
    """Set one dotted key in place: `stage.direct.lr=1e-4`, `data.train.0.share=2`.

    Items of a list go by their index or their `name`. The value is read as TOML, and is a string
    if it is none.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment!r}, expected key=value", field="--set")
    *parents, last = key.strip().split(".")
    node: Any = tables
    for part in parents:
        node = node[_place(node, part, key)]
    node[_place(node, last, key)] = _value(text.strip())


def _parse(path: Path) -> Json:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", code="NoConfig") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", code="NoConfig") from None


def _place(node: object, part: str, key: str) -> str | int:
    """The key or index that `part` means; a table gets a new key where it has none."""
    if isinstance(node, dict):
        node.setdefault(part, {})
        return part
    places: dict[str, int] = {}
    for index, item in enumerate(node if isinstance(node, list) else []):
        places[str(index)] = index
        if isinstance(item, dict) and "name" in item:
            places[str(item["name"])] = index
    if part not in places:
        choices = f"expected one of {', '.join(places)}" if places else "there is no table"
        raise ConfigError(f"--set {key}: {part!r} not found, {choices}", field=key)
    return places[part]


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _problem(error: ErrorDetails, schema: Json) -> str:
    """One error of pydantic in our words."""
    kind, where, found = error["type"], _dotted(error), error["input"]
    if kind in UNKNOWN:
        *parents, last = error["loc"]
        close = get_close_matches(str(last), _keys(schema, parents), n=1)
        return f"unknown key {where!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    if kind == "missing":
        return f"missing key {where!r}"
    if kind == "value_error":
        reason = str(error["ctx"]["error"])
        return reason if reason.startswith(where) else f"{where}: {reason}"
    if kind == "literal_error":
        return f"{where} = {found!r}, expected {error['ctx']['expected']}"
    if kind in EXPECTED:
        return f"{where} = {found!r:.60}, expected {EXPECTED[kind]}"
    return f"{where}: {error['msg']}"


def _dotted(error: ErrorDetails) -> str:
    return ".".join(map(str, error["loc"]))


def _keys(schema: Json, place: Sequence[str | int]) -> list[str]:
    """Keys that the table at a place may have."""
    node = schema
    for part in place:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return list(node["properties"])
