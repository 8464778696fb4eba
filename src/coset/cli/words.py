"""Values of options that are written as words: meshes, paths, temperatures."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from coset.errors import ConfigError
from coset.workflows.phonons.by_phonopy import Pieces
from coset.workflows.phonons.mesh import Mesh

GAMMA = ("G", "GAMMA", "Γ")


def mesh_of(text: str | None, field: str) -> Mesh | None:
    """Three numbers from `4x4x4` or `4 4 4`.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    words = text.replace("x", " ").replace(",", " ").split()
    if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--{field} {text!r}: expected three numbers as 4x4x4", field=field)
    a, b, c = (int(word) for word in words)
    return a, b, c


def path_of(text: str) -> Pieces | None:
    """Points from `G-X-U|K-G-L`, where G, GAMMA and Γ are the same; None from `auto`.

    Raises:
        ConfigError: a piece without two points.
    """
    if text == "auto":
        return None
    words = (piece.replace("-", " ").split() for piece in text.replace(",", "|").split("|"))
    pieces = tuple(tuple("Γ" if name in GAMMA else name for name in piece) for piece in words)
    if not all(len(piece) > 1 and all(a != b for a, b in pairwise(piece)) for piece in pieces):
        raise ConfigError(
            f"--path {text!r}: expected auto, or pieces of two points or more, as 'G-X-U|K-G-L'",
            field="path",
        )
    return pieces


def born_of(file: Path | None) -> str | None:
    """Text of a BORN file; whether it fits the crystal is for later.

    Raises:
        ConfigError: no text.
    """
    try:
        return None if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--born {file}: this is no text, expected a BORN file of phonopy", field="born"
        ) from error


def temperatures_of(text: str) -> tuple[float, ...]:
    """Temperatures from `300`, `100,300` or `0:1000:100`, the last one included.

    Raises:
        ConfigError: anything else.
    """
    try:
        if ":" not in text:
            return tuple(float(word) for word in text.split(","))
        first, last, step = (float(word) for word in text.split(":"))
        return tuple(float(kelvin) for kelvin in np.arange(first, last + 0.5 * step, step))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"--temperatures {text!r}: expected 300, 100,300 or 0:1000:100", field="temperatures"
        ) from None
