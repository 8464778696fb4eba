"""The checker that pytest puts around functions with shapes in their signature.

beartype checks the annotated arrays, and nothing else: a test may pass wrong types on purpose, and
a stand-in for a protocol has only what the test needs. mypy checks the other types.
"""

import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or with arrays in its signature a version that checks their shapes."""
    hints = {name: _arrays_of(hint) for name, hint in function.__annotations__.items()}
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(function)


def _arrays_of(hint: Any) -> Any:
    """The annotation with all but arrays, alone, optional or in a tuple, replaced by Any."""
    if hint is NoneType or (inspect.isclass(hint) and issubclass(hint, AbstractArray)):
        return hint
    members = tuple(_arrays_of(member) for member in get_args(hint))
    if all(member is Any for member in members) or Ellipsis in get_args(hint):
        return Any
    if get_origin(hint) in (Union, UnionType):
        return Union[members]  # noqa: UP007
    return tuple[members] if get_origin(hint) is tuple else Any
