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
Keep = Callable[[int, Result], None]
"""Told the result of one structure of a batch as soon as it is known; told again, it replaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderCommand(Generic[Result]):
    """What a command does with structures, and what it says and writes of each.

    name: of the command, its folders and the record in them. settings: everything that can change a
    number. compute: tells `keep` one result per structure. fields: for the record. show: tables of
    all records. write: files of one structure; False if there is nothing to write. files: patterns
    of their names.
    """

    name: str
    settings: dict[str, Any]
    compute: Callable[[Structures, Stopper, Keep[Result]], None]
    fields: Callable[[Result, Loaded], dict[str, Any]]
    show: Callable[[list[dict[str, Any]]], None]
    write: Callable[[Path, Loaded, dict[str, Any], Result], bool]
    files: tuple[str, ...]

    def run(
        self,
        session: Session,
        loaded: Sequence[Loaded],
        output: str | None,
        *,
        overwrite: bool,
        as_json: bool,
    ) -> int:
        """Compute, write each result as soon as it is known, and tell; the exit code.

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
        written, failures = dict[Path, None](), list[OSError]()

        def keep(number: int, result: Result) -> None:
            record, folder = records[places[number]], folders[number]
            record |= self.fields(result, own[number])
            try:
                if self._replace(folder, own[number], record, result):
                    written[folder] = None
            except OSError as error:
                failures.append(error)

        with stopper() as flag:
            self.compute(structures, flag, keep)
        if not as_json:
            self.show(records)
        tell(self.name, session, self.settings, records, as_json=as_json)

        def said() -> list[str]:
            if failures:
                raise failures[0]
            return [str(folder) for folder in written]

        return attempt(said) or flag.code or exit_code(records)

    def _replace(self, folder: Path, one: Loaded, record: dict[str, Any], result: Result) -> bool:
        """Write a result, its record last; nothing of an older result stays beside it."""
        own_record = f"{self.name}.json"
        for pattern in (own_record, *self.files):
            for path in folder.glob(pattern):
                path.unlink()
        if found := self.write(folder, one, record, result):
            write_record(folder / own_record, record)
        return found


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
