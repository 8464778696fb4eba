"""Structure files in and out: content decides what they are, and every frame fails for itself."""

import errno
import io
import sqlite3
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO, TypeVar

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import formats
from ase.io.aims import AimsParseError
from ase.io.cif import CIFBlock, parse_cif
from ase.outputs import all_outputs
from ase.spacegroup.spacegroup import SpacegroupError
from jaxtyping import Bool
from torch import Tensor

from coset.ase_interface.atoms import error_of, fixed_atoms, is_disordered, one_structure, to_ase
from coset.ase_interface.calculators import results_of
from coset.ase_interface.text_formats import content_format, xyz_fault, xyz_frames
from coset.atomic_files import write_file
from coset.errors import StructureError
from coset.neighbors import overlap
from coset.structures import Properties, Structures, validate

# Extensions that several codes share: they claim nothing about the content.
SHARED_EXTENSIONS = frozenset({"in", "out", "log", "dat", "config", "txt"})
# Symbols in files: what ASE calls them, and the mass in amu (CODATA 2018) where it is not usual.
ALIASES = {"D": ("H", 2.01410), "T": ("H", 3.01605), "Bq": ("X", None), "Gh": ("X", None)}
# Formats read back without loss: whether they hold many frames, whether open directions.
WRITABLE = {
    "extxyz": (True, True),
    "traj": (True, True),
    "cif": (True, False),
    "vasp": (False, False),
}
KEPT_ARRAYS = ("tags", "masses", "initial_magmoms", "initial_charges")
IGNORED_ARRAYS = {
    "initial_magmoms": "magmoms_ignored",
    "initial_charges": "atomic_charges_ignored",
}
HEAD_BYTES = 50_000
# What foreign parsers raise on bad text (this package has no `except Exception`).
READER_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, OSError),
    *(RuntimeError, NameError, SyntaxError, EOFError, ImportError, MemoryError, StopIteration),
    *(sqlite3.Error, formats.UnknownFileTypeError, ase.io.ParseError, AimsParseError),
    *(SpacegroupError,),
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """One frame of an input file, or why it was refused.

    fixed: atoms that must not move. format: ASE's name of the file format.
    """

    input: str
    index: int
    atoms: Atoms | None = None
    structures: Structures | None = None
    fixed: Bool[Tensor, " atoms"] | None = None
    format: str = ""
    error: StructureError | None = None
    warnings: tuple[str, ...] = ()


def read_structures(paths: Sequence[str], *, drop_ghosts: bool = False) -> list[Loaded]:
    """Every frame of every file, in order; `-` is extended XYZ on standard input.

    Nothing is raised for a bad file or frame: it becomes a `Loaded` with `error`.
    """
    return [
        _load(frame, drop_ghosts=drop_ghosts) for path in paths for frame in iterate_frames(path)
    ]


def iterate_frames(path: str) -> Iterator[Loaded]:
    """Frames of one file as ASE reads them, one by one: with `atoms`, or with `error`.

    Nothing is raised, nothing in the frames is checked, and each fails for itself.
    """
    format, _ = _attempt(partial(_format_of, path), path)
    if isinstance(format, StructureError):
        yield Loaded(input=path, index=0, error=format)
        return
    parts, index = _parts(path, format), 0
    while True:
        frame = Loaded(input=path, index=index, format=format)
        part, notes = _attempt(partial(next, parts, None), path)
        if part is None:
            break
        if isinstance(part, StructureError):
            yield replace(frame, error=part, warnings=notes)
            return
        atoms, more = _attempt(part, f"{path}@{index}")
        frame = replace(frame, warnings=(*notes, *more))
        if isinstance(atoms, StructureError):
            yield replace(frame, error=atoms)
        elif atoms is not None:
            yield replace(frame, atoms=atoms)
        index += atoms is not None
    if index == 0:
        yield replace(frame, error=_file_error("EmptyFile", "no structures in it", path))


def result_file(
    source: str, format: str, structures: Structures, tag: str = "relaxed"
) -> tuple[str, str]:
    """Name and format for results on frames of `source`: `Si.cif` gives `Si-relaxed.cif`.

    The format is that of the source where it holds the structures without loss, else extended XYZ.
    """
    name = Path("stdin.extxyz" if source == "-" else formats.get_compression(source)[0])
    many_frames, open_directions = WRITABLE.get(format, (False, False))
    closed = structures.pbc.all() and (torch.linalg.det(structures.cell) > 0).all()
    fits = (many_frames or len(structures) == 1) and (open_directions or bool(closed))
    if format in WRITABLE and fits:
        return f"{name.stem}-{tag}{name.suffix}", format
    return f"{name.stem}-{tag}.extxyz", "extxyz"


def write_structures(
    path: Path,
    structures: Structures,
    *,
    format: str = "extxyz",
    properties: Properties | None = None,
    originals: Sequence[Atoms] | None = None,
    info: Sequence[Mapping[str, str | int]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write all systems to one file in a single step.

    properties: energy, forces and stress to store with them, where the format can and they are
    finite. info: what else to say about each system, where the format can.
    originals: frames whose constraints, masses, tags and identifiers (strings and integers in
    `info`) are kept; numbers measured on the old geometry are not.

    Raises:
        FileExistsError: the file exists and `overwrite` is false.
    """
    if not overwrite and (path.exists() or path.is_symlink()):
        raise FileExistsError(errno.EEXIST, "exists already (--force overwrites it)", str(path))
    frames = to_ase(structures)
    for k, frame in enumerate(frames):
        if originals is not None:
            _keep_identity(frame, originals[k])
        if info is not None:
            frame.info.update(info[k])
        if properties is not None:
            frame.calc = SinglePointCalculator(frame, **results_of(properties, structures, k))
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        ase.io.write(draft, frames if len(frames) > 1 else frames[0], format=format)
        write_file(path, draft.read_bytes())


def _load(frame: Loaded, *, drop_ghosts: bool) -> Loaded:
    """The frame with its structure, or the reason why it has none."""
    atoms, name = frame.atoms, f"{frame.input}@{frame.index}"
    if atoms is None:
        return frame
    notes = frame.warnings
    ghosts = np.flatnonzero(atoms.numbers == 0)
    if drop_ghosts and len(ghosts):
        notes = (*notes, "ghosts_dropped:" + ",".join(str(k) for k in ghosts))
        atoms = atoms[atoms.numbers != 0]
    frame = replace(frame, atoms=atoms, warnings=(*notes, *_ignored(atoms)))
    try:
        structures, fixed = one_structure(atoms, name), fixed_atoms(atoms, name)
        validate(structures, [name])
        if error := overlap(structures, name):
            raise error
    except StructureError as error:
        return replace(frame, error=error)
    return replace(frame, structures=structures, fixed=fixed)


def _ignored(atoms: Atoms) -> Iterator[str]:
    """Warnings for what the file says and the models do not use."""
    for array, warning in IGNORED_ARRAYS.items():
        values = atoms.arrays.get(array, np.zeros(1))
        if values.dtype.kind in "fiu" and values.any():
            yield warning
    masses = atoms.arrays.get("masses", np.ones(len(atoms)))
    if (masses[atoms.numbers == 1] > 1.5).any():
        yield "hydrogen_isotopes"


def _attempt(call: Callable[[], T], name: str) -> tuple[T | StructureError, tuple[str, ...]]:
    """What foreign code returns, or why it failed, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result: T | StructureError = call()
        except StructureError as error:
            result = error
        except READER_ERRORS as error:
            # A check without a message is told by its own text.
            said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
            reason = f"no reader understands it, {type(error).__name__}: {said}".splitlines()[0]
            result = _file_error("UnreadableFile", reason, name, "check the file")
    texts = [str(w.message).splitlines()[0] for w in caught if w.category is UserWarning]
    return result, tuple(f"reader: {text}" for text in texts)


def _format_of(path: str) -> str:
    """Format by content first; the name may not contradict it.

    Raises:
        StructureError: codes UnreadableFile, EmptyFile, FormatMismatch.
    """
    if path == "-":
        return "extxyz"
    if not Path(path).is_file():
        reason = "is not a regular file" if Path(path).exists() else "no such file"
        raise _file_error("UnreadableFile", reason, path)
    with formats.open_with_compression(path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
    if not head.strip():
        raise _file_error("EmptyFile", "the file is empty", path)
    content, claims = content_format(head), _claims(path)
    if content is None:
        return claims[0] if claims else str(formats.filetype(path))
    agreeing = [claim for claim in claims if claim.startswith(content)]
    if claims and not agreeing:
        message = f"the content is {content}, the name says {' or '.join(claims)}"
        raise _file_error("FormatMismatch", message, path, "rename the file")
    return agreeing[0] if agreeing else content


def _claims(path: str) -> list[str]:
    """Formats that a file name stands for."""
    name = Path(formats.get_compression(path)[0]).name
    extension = Path(name).suffix.strip(".").lower()
    claims = [entry.name for entry in formats.ioformats.values() if entry.match_name(name)]
    if extension in formats.extension2format and extension not in SHARED_EXTENSIONS:
        claims.append(formats.extension2format[extension].name)
    elif extension in formats.ioformats:
        claims.append(extension)
    return claims


def _parts(path: str, format: str) -> Iterator[Callable[[], Atoms | None]]:
    """One call per frame, each of which can fail without the others."""
    if format == "extxyz":
        with _text(path) as stream:
            for first, lines in xyz_frames(stream):
                yield partial(_xyz_atoms, first, lines)
    elif format == "cif":
        with formats.open_with_compression(path, "rb") as stream:
            for block in parse_cif(io.BytesIO(stream.read().removeprefix(b"\xef\xbb\xbf"))):
                yield partial(_cif_atoms, block, path)
    else:
        for atoms in ase.io.iread(path, ":", format=format, do_not_split_by_at_sign=True):
            yield partial(_same, atoms)


def _same(atoms: Atoms) -> Atoms:
    return atoms


def _text(path: str) -> AbstractContextManager[TextIO]:
    """Lines of a text file or of standard input; bytes that are not UTF-8 spoil one frame only."""
    if path == "-":
        return nullcontext(sys.stdin)
    stream = formats.open_with_compression(path, "rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")


def _xyz_atoms(first: int, lines: list[str]) -> Atoms:
    """One frame; symbols that ASE does not know are translated, with their masses."""
    if fault := xyz_fault(first, lines):
        raise ValueError(fault)
    head, rows = [*lines, "\n"][:2], lines[2:]
    masses: dict[int, float] = {}
    if "Properties=" not in head[1] or "Properties=species" in head[1].replace('"', ""):
        for k, row in enumerate(rows):
            word = row.split(maxsplit=1)[0]
            symbol, mass = ALIASES.get(word.capitalize(), (word, None))
            rows[k] = row.replace(word, symbol, 1)
            if mass is not None:
                masses[k] = mass
    atoms: Atoms = next(ase.io.iread(io.StringIO("".join([*head, *rows])), ":", format="extxyz"))
    if masses and not atoms.has("masses"):
        usual = atoms.get_masses()
        atoms.set_masses([masses.get(k, usual[k]) for k in range(len(atoms))])
    return atoms


def _cif_atoms(block: CIFBlock, name: str) -> Atoms | None:
    """The structure of one block, None if it has none (text, references)."""
    if not block.has_structure():
        return None
    atoms = block.get_atoms()
    if not atoms.has("spacegroup_kinds") or is_disordered(atoms):
        return atoms
    lost = set(range(len(block.get_symbols()))) - set(atoms.arrays["spacegroup_kinds"].tolist())
    if lost:
        message = f"site {min(lost)} repeats another one (0 and 1 are the same coordinate)"
        raise error_of("DuplicateSite", "positions", message, name, "list every site once")
    return atoms


def _file_error(code: str, message: str, path: str, hint: str = "") -> StructureError:
    return error_of(code, "file", message, path, hint)


def _keep_identity(frame: Atoms, original: Atoms) -> None:
    frame.set_constraint(original.constraints)
    for key in KEPT_ARRAYS:
        if original.has(key):
            frame.set_array(key, original.get_array(key))
    for key, value in original.info.items():
        if isinstance(value, str | int) and key not in (*all_outputs, "unit_cell"):
            frame.info.setdefault(key, value)
