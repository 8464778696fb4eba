"""What all commands share: options, reading, the JSON document, exit codes, progress."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

import coset
from coset.ase_interface import Loaded
from coset.catalog import DEFAULT_MODEL
from coset.catalog import load_model as read_model
from coset.loading import LoadSettings, potential_of
from coset.potential import ModelPotential
from coset.structures import Structures, concatenate

PLAIN_WIDTH = 160
NOT_CONVERGED, USAGE = 1, 2
BAD_INPUT, MISSING_EXTRA, CANNOT_WRITE, STOPPED, INTERRUPTED = 65, 69, 74, 75, 130
# By name, because not every system has SIGUSR1, which batch systems send ahead of the limit.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")

# No markup: names of files and words of others are printed as they are.
console = Console(
    stderr=True,
    markup=False,
    highlight=False,
    width=None if sys.stderr.isatty() else PLAIN_WIDTH,
)


class Dtype(StrEnum):
    """Precision of geometry and network."""

    float32 = "float32"
    float64 = "float64"
    mixed = "mixed"


FilesArgument = Annotated[list[str], typer.Argument(help="Structure files; - for extxyz on stdin.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Model directory, .ckpt file or name; default: the one that comes with coset.",
    ),
]
TargetOption = Annotated[
    str | None, typer.Option(help="Energy head, for a model that has several.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="mixed: float64 geometry, float32 network.", case_sensitive=False)
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; default: the cores this process may use.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
OutputOption = Annotated[
    str | None,
    typer.Option("--output", "-o", help="FILE.extxyz for all results, or a directory."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
GhostsOption = Annotated[bool, typer.Option("--drop-ghosts", help="Remove atoms without element.")]
ChargeOption = Annotated[
    bool, typer.Option("--ignore-charge", help="Evaluate charged systems as neutral.")
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A loaded model and what a JSON document says about it."""

    potential: ModelPotential
    model: dict[str, str]
    settings: dict[str, Any]


def open_session(
    model: str | None,
    *,
    target: str | None,
    device: str,
    dtype: Dtype,
    threads: int | None,
    forces: str = "conservative",
    ignore_charge: bool = False,
) -> Session:
    """Load the model with the options that all commands share."""
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = read_model(model or DEFAULT_MODEL)
    settings = LoadSettings(
        target=target, dtype=dtype, device=device, forces=forces, ignore_charge=ignore_charge
    )
    potential = potential_of(checkpoint, settings)
    return Session(
        potential=potential,
        model={
            "name": potential.name,
            "sha256": checkpoint.sha256,
            "level_of_theory": potential.level_of_theory,
        },
        settings={
            "target": potential.outputs.energy[0],
            "dtype": str(dtype),
            "device": str(potential.baseline.device),
            "forces": forces,
            "ignore_charge": ignore_charge,
        },
    )


def usable(loaded: Sequence[Loaded]) -> tuple[list[int], Structures | None]:
    """Places of the frames that can be used, and their batch (None without any)."""
    places = [k for k, one in enumerate(loaded) if one.structures is not None]
    found = [s for one in loaded if (s := one.structures) is not None]
    return places, concatenate(found) if found else None


def record_of(one: Loaded) -> dict[str, Any]:
    """The fields that every result has; a rejection until a result replaces it."""
    atoms, error = one.atoms, one.error
    return {
        "input": one.input,
        "index": one.index,
        "formula": atoms.get_chemical_formula() if atoms is not None else None,
        "n_atoms": len(atoms) if atoms is not None else None,
        "status": "rejected",
        "code": error.code if error else "",
        "reason": error.reason if error else "",
        "warnings": list(one.warnings),
    }


class Outcome(Protocol):
    """What every workflow says about every structure."""

    @property
    def status(self) -> str:
        """One word."""
        ...

    @property
    def code(self) -> str:
        """Name of what went wrong, or nothing."""
        ...

    @property
    def reason(self) -> str:
        """One sentence."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """Names."""
        ...


def outcome_fields(result: Outcome, one: Loaded) -> dict[str, Any]:
    """The fields of a record that tell how it went; warnings of the file come first."""
    return {
        "status": result.status,
        "code": result.code,
        "reason": result.reason,
        "warnings": [*one.warnings, *result.warnings],
    }


def print_json(document: object) -> None:
    """One strict JSON document; NaN and infinity become null."""
    sys.stdout.write(json.dumps(plain(document), ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:  # noqa: ANN401
    """JSON types from tensors, arrays, tuples and numbers."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def exit_code(records: Sequence[dict[str, Any]]) -> int:
    """0 all done, 65 everything was rejected, 1 something was not as asked."""
    statuses = {record["status"] for record in records}
    if statuses <= {"ok", "converged"}:
        return 0
    return BAD_INPUT if statuses == {"rejected"} else NOT_CONVERGED


def report_problems(records: Sequence[dict[str, Any]]) -> None:
    """One line for each structure that is not as asked, by name and reason."""
    for record in records:
        if record["status"] not in ("ok", "converged"):
            reason = f"{record['status']} ({record['code']}): {record['reason']}"
            console.print(f"{label_of(record)} {reason}", style="yellow", soft_wrap=True)


def label_of(record: dict[str, Any]) -> str:
    """File name, with the frame where it is not the first."""
    name = Path(record["input"]).name
    return f"{name}[{record['index']}]" if record["index"] else name


def result_table(*columns: str) -> Table:
    """A plain table whose cells are never cut."""
    return Table(*(Column(name, no_wrap=True) for name in columns), box=SIMPLE_HEAD)


def short(value: float) -> str:
    """Two digits; 0 for rounding, - for what is undefined."""
    if math.isnan(value):
        return "-"
    return "0" if abs(value) < 1e-10 else f"{value:.2g}"


def tell(
    command: str,
    session: Session,
    settings: dict[str, Any],
    records: list[dict[str, Any]],
    *,
    as_json: bool,
) -> None:
    """Say what became of every structure: the JSON document if asked for, and the problems."""
    if as_json:
        document = {
            "coset": coset.__version__,
            "command": command,
            "model": session.model,
            "settings": session.settings | settings,
            "results": records,
        }
        print_json(document)
    report_problems(records)


def attempt(write: Callable[[], list[str]]) -> int:
    """Write results and say where; the exit code if that is not possible, else 0."""
    try:
        written = write()
    except OSError as error:
        console.print(f"error (CannotWrite): {error}", style="red", soft_wrap=True)
        return CANNOT_WRITE
    console.print(f"wrote {', '.join(written)}" if written else "nothing to write", soft_wrap=True)
    return 0


class Stopper:
    """Turns the first signal into a flag; a Ctrl-C after it interrupts at once."""

    def __init__(self, notice: str) -> None:
        """Not stopped; notice: what is said when it is (nothing if empty)."""
        self.code = 0
        self.notice = notice

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.code:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.code = INTERRUPTED if number == signal.SIGINT else STOPPED
        if self.notice:
            console.print(self.notice)

    def watch(self, update: Callable[[int, str], None]) -> Callable[[int, str], bool]:
        """An observer for long work: it updates a bar and says whether to stop."""

        def observer(n_done: int, note: str) -> bool:
            update(n_done, note)
            return self.code != 0

        return observer


@contextmanager
def stopper(
    notice: str = "stopping after this evaluation; Ctrl-C again loses what is not finished",
) -> Iterator[Stopper]:
    """A `Stopper` for the time of the block; former handlers come back."""
    flag = Stopper(notice)
    caught = [s for s in signal.Signals if s.name in STOP_SIGNALS]
    former = {s: signal.signal(s, flag) for s in caught}
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left on a terminal, else a plain line every five seconds."""
    if not console.is_terminal:
        yield _plain_progress(total, what)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")

        def update(done: int, note: str) -> None:
            bar.update(task, completed=done, note=note)

        yield update


def _plain_progress(total: int, what: str) -> Callable[[int, str], None]:
    start = last = time.monotonic()

    def update(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 5.0:
            last = now
            console.print(f"{what} {done}/{total} after {now - start:.0f} s {note}")

    return update
