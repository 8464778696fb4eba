"""The type checker that pytest puts around every function of the package: beartype, for shapes.

Protocols are taken as Any, because a stand-in in a test has only what the test needs.
"""

from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from beartype import BeartypeConf, beartype

NUMERIC_TOWER = BeartypeConf(is_pep484_tower=True)  # an int is a float


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with arguments and result checked against its annotations."""
    function.__annotations__ = {
        name: _without_protocols(hint) for name, hint in function.__annotations__.items()
    }
    return beartype(function, conf=NUMERIC_TOWER)


def _without_protocols(hint: Any) -> Any:
    if getattr(hint, "_is_protocol", False):
        return Any
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_without_protocols(member) for member in get_args(hint))]  # noqa: UP007
    if any(getattr(member, "_is_protocol", False) for member in get_args(hint)):
        return get_origin(hint)
    return hint
