"""Commands that leave one folder of results for every structure."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import typer

from coset.ase_interface import Loaded
from coset.atomic_files import write_file
from coset.cli.common import (
    Session,
    Stopper,
    attempt,
    exit_code,
    plain,
    record_of,
    stopper,
    tell,
    usable,
)
from coset.structures import Structures

FolderOption = Annotated[
    str | None,
    typer.Option("--output", "-o", help="Directory for the results; default: the current one."),
]
BornOption = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="Born charges and dielectric tensor, a BORN file."
    ),
]
PlotOption = Annotated[bool, typer.Option("--plot", help="Draw a figure beside the results.")]


Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderCommand(Generic[Result]):
    """What a command does with structures, and what it says and writes of each.

    name: of the command and its folders. settings: everything that can change a number. compute:
    one result per structure. fields: for the record. show: tables of all records. write: the files
    of one structure and the name of their folder, or None if there is nothing to write.
    """

    name: str
    settings: dict[str, Any]
    compute: Callable[[Structures, Stopper], list[Result]]
    fields: Callable[[Result, Loaded], dict[str, Any]]
    show: Callable[[list[dict[str, Any]]], None]
    write: Callable[[Path, Loaded, dict[str, Any], Result], str | None]

    def run(
        self,
        session: Session,
        loaded: Sequence[Loaded],
        output: str | None,
        *,
        overwrite: bool,
        as_json: bool,
    ) -> int:
        """Compute, tell and write; the exit code.

        Raises:
            FileExistsError: before anything is computed.
        """
        records = [record_of(one) for one in loaded]
        places, structures = usable(loaded)
        own = [loaded[place] for place in places]
        folders = result_folders(output, own, self.name, overwrite=overwrite)
        if structures is None:
            tell(self.name, session, self.settings, records, as_json=as_json)
            return exit_code(records)
        with stopper() as flag:
            results = self.compute(structures, flag)
        for place, result in zip(places, results, strict=True):
            records[place] |= self.fields(result, loaded[place])
        if not as_json:
            self.show(records)
        tell(self.name, session, self.settings, records, as_json=as_json)
        done = [records[place] for place in places]

        def write() -> list[str]:
            said = map(self.write, folders, own, done, results)
            return [folder for folder in said if folder is not None]

        return attempt(write) or flag.code or exit_code(records)


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
