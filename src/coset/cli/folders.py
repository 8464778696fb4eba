"""One folder of results for every structure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from coset.ase_interface import Loaded
from coset.atomic_files import write_file
from coset.cli.common import plain

FolderOption = Annotated[
    str | None,
    typer.Option("--output", "-o", help="Directory for the results; default: the current one."),
]
PlotOption = Annotated[bool, typer.Option("--plot", help="Draw a figure beside the results.")]


def result_folders(
    output: str | None, loaded: Sequence[Loaded], tag: str, *, overwrite: bool
) -> list[Path]:
    """`STEM-TAG`, with the number of the frame where it is not the first; none exists yet.

    Raises:
        FileExistsError: before anything is computed.
    """
    base, folders = Path(output or ""), list[Path]()
    for one in loaded:
        stem = "stdin" if one.input == "-" else Path(one.input).stem
        index = f"-{one.index}" if one.index else ""
        folder, number = base / f"{stem}{index}-{tag}", 2
        while folder in folders:
            folder = base / f"{stem}{index}-{number}-{tag}"
            number += 1
        if (folder.exists() or folder.is_symlink()) and not overwrite:
            raise FileExistsError(f"{folder} exists already; --force overwrites it")
        folders.append(folder)
    return folders


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """One result as JSON, with the fields of the document on standard output."""
    text = json.dumps(plain(dict(record)), ensure_ascii=False, allow_nan=False, indent=1)
    write_file(path, (text + "\n").encode())
