"""What a structure file is by its content, and extended XYZ cut into frames.

Readers trust extensions and give up at the first bad frame; this is what is needed to do better.
"""

import re
from collections.abc import Callable, Iterable, Iterator

SIGNATURES = {b"SQLite format 3\x00": "db", b"- of UlmASE-Trajectory": "traj"}
CIF_BLOCK = re.compile(r"^\s*data_", re.IGNORECASE | re.MULTILINE)
CIF_TAG = re.compile(r"^\s*(loop_|_cell|_atom_site|_symmetry|_space_group)", re.I | re.MULTILINE)
# How Python shows bytes that are not UTF-8 (surrogateescape).
UNDECODED = re.compile("[\udc80-\udcff]")


def content_format(head: bytes) -> str | None:
    """Format that the first bytes of a file prove: cif, extxyz, vasp, traj, db; else None."""
    for magic, name in SIGNATURES.items():
        if head.startswith(magic):
            return name
    text = head.decode("utf-8-sig", errors="replace")
    lines = [line.split() for line in text.splitlines()[:6]]
    for name, test in TEXT_TESTS.items():
        if test(text, lines):
            return name
    return None


def xyz_frames(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Frames of extended XYZ text, each with the number of its first line.

    A frame runs from a line that holds one integer to the next such line, whatever the integer is,
    so that a wrong count spoils one frame only. Blank lines are dropped, but for comment lines.
    """
    frame: list[str] = []
    first = 1
    for number, line in enumerate(lines, 1):
        is_comment = len(frame) == 1 and frame[0].strip().isdigit()
        if not is_comment and line.strip().isdigit():
            if frame:
                yield first, frame
            frame, first = [line], number
        elif is_comment or line.strip():
            frame.append(line)
    if frame:
        yield first, frame


def xyz_fault(first: int, frame: list[str]) -> str | None:
    """What is wrong with the bytes or the number of lines of a frame, or None."""
    for number, row in enumerate(frame):
        if not row.isascii() and UNDECODED.search(row):
            return f"line {first + number} is not UTF-8"
    if not frame[0].strip().isdigit():
        return f"line {first}: expected a number of atoms, found {frame[0].strip()[:40]!r}"
    n_rows = sum(not row.lstrip().startswith("VEC") for row in frame[2:])
    if n_rows != int(frame[0]):
        return f"line {first}: {int(frame[0])} atoms are announced, {n_rows} follow"
    return None


def _is_cif(text: str, lines: list[list[str]]) -> bool:
    return bool(CIF_BLOCK.search(text) and CIF_TAG.search(text))


def _is_xyz(text: str, lines: list[list[str]]) -> bool:
    if not lines or len(lines[0]) != 1 or not lines[0][0].isdigit():
        return False
    has_rows = len(lines) > 2 and len(lines[2]) >= 4 and _are_numbers(lines[2][1:4])
    has_comment = len(lines) > 1 and any("Properties=" in word for word in lines[1])
    return int(lines[0][0]) == 0 or has_rows or has_comment


def _is_poscar(text: str, lines: list[list[str]]) -> bool:
    """Scale, three vectors, then only words (symbols) or only whole numbers (counts)."""
    if len(lines) < 6 or len(lines[1]) not in (1, 3) or not lines[5]:
        return False
    vectors = all(len(row) == 3 and _are_numbers(row) for row in lines[2:5])
    counts = len({word.isdigit() for word in lines[5]}) == 1
    return vectors and counts and _are_numbers(lines[1])


def _are_numbers(words: list[str]) -> bool:
    try:
        for word in words:
            float(word)
    except ValueError:
        return False
    return True


TEXT_TESTS: dict[str, Callable[[str, list[list[str]]], bool]] = {
    "cif": _is_cif,
    "extxyz": _is_xyz,
    "vasp": _is_poscar,
}
