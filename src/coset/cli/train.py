"""coset train, coset plan: a run from its file, and what that run would cost."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import coset
from coset.cli.common import (
    STOPPED,
    JsonOption,
    ThreadsOption,
    console,
    print_json,
    result_table,
    stopper,
)
from coset.config.training import read_training
from coset.data.store import MANIFEST
from coset.errors import CheckpointError, ConfigError
from coset.strict_json import parse_json
from coset.training.log import METRICS
from coset.training.plan import Plan, StoreSize, make_plan, matmul_flop_per_s
from coset.training.settings import TrainSettings

if TYPE_CHECKING:
    from coset.training.loop import StepReport, TrainOutcome

SECONDS_BETWEEN_LINES = 30.0
SECONDS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
STOPPING = "stopping after this step, then saving; Ctrl-C again loses what was not saved"

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="File of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key of the file, as in stage.direct.lr=1e-4; may be repeated.",
    ),
]


class Resume(StrEnum):
    """What becomes of a run that has begun."""

    auto = "auto"
    never = "never"


def train(
    config: ConfigArgument,
    resume: Annotated[
        Resume,
        typer.Option(
            help="auto: go on from the last saved step; never: refuse a run that has begun."
        ),
    ] = Resume.auto,
    changes: SetOption = None,
    max_time: Annotated[
        str | None, typer.Option("--max-time", help="Save and stop after it, as in 2h30m.")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model; the same command goes on where a stopped run was saved."""
    from coset.training.loop import train as run_training  # noqa: PLC0415  (not for other commands)
    from coset.training.parallel import is_main  # noqa: PLC0415

    settings = read_training(config, changes or ())
    limit = None if max_time is None else seconds_of(max_time)
    if threads is not None:
        torch.set_num_threads(threads)
    main = is_main()
    if main:
        _announce(settings)
    with stopper(STOPPING if main else "") as flag, _reports(settings.steps, main=main) as report:
        outcome = run_training(
            settings,
            resume=resume is Resume.auto,
            max_seconds=limit,
            should_stop=lambda: flag.code != 0,
            report=report,
            say=_say,
        )
    if main:
        _tell(settings, outcome, as_json=as_json)
    raise typer.Exit(0 if outcome.finished else flag.code or STOPPED)


def plan(config: ConfigArgument, changes: SetOption = None, as_json: JsonOption = False) -> None:
    """Say what a run needs before it starts: memory, operations, steps, data, time."""
    settings = read_training(config, changes or ())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stores = [store_size(store.path) for store in settings.data.train]
    valid = [store_size(path) for path in settings.data.valid]
    rate = matmul_flop_per_s(settings.model.network, device)
    planned = make_plan(settings, stores, rate)
    if as_json:
        sizes = {"train": [asdict(s) for s in stores], "valid": [asdict(s) for s in valid]}
        _print_document("plan", settings, {"device": device.type, **asdict(planned), **sizes})
        return
    _show_plan(planned, device)
    _show_stores(stores, valid, planned)


def seconds_of(text: str) -> float:
    """Seconds in a time like 2h30m, 90m or 1d12h.

    Raises:
        ConfigError: anything else, numbers without a unit included.
    """
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        raise ConfigError(
            f"--max-time {text!r}, expected numbers with units d, h, m, s, as in 2h30m",
            field="--max-time",
        )
    return sum(float(n) * SECONDS[unit] for n, unit in re.findall(r"([\d.]+)([dhms])", text))


def store_size(path: str) -> StoreSize:
    """What the manifest of a store says about its size; a problem instead of an error."""
    try:
        manifest = parse_json((Path(path) / MANIFEST).read_bytes(), MANIFEST)
        return StoreSize(
            path=path,
            structures=int(manifest["structures"]),
            atoms=int(manifest["atoms"]),
            bytes=sum(int(file["bytes"]) for file in manifest["files"].values()),
        )
    except OSError as error:
        return StoreSize(path=path, problem=f"no {MANIFEST} ({error.strerror})")
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return StoreSize(path=path, problem=f"{MANIFEST} is not that of a store")


@contextmanager
def _reports(total: int, *, main: bool) -> Iterator[Callable[["StepReport"], None]]:
    """A bar on a terminal, else a plain line now and then; a note is a line of its own."""
    if not (main and console.is_terminal):
        yield _plain_lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total, state="")

        def show(now: "StepReport") -> None:
            if now.note:
                _say(f"step {now.step}: {now.note}")
                return
            bar.update(task, description=now.stage, completed=now.step, state=_state(now))

        yield show


def _plain_lines() -> Callable[["StepReport"], None]:
    last = -math.inf

    def show(now: "StepReport") -> None:
        nonlocal last
        place = f"step {now.step}/{now.total} {now.stage}"
        clock = time.monotonic()
        if now.note:
            _say(f"{place}: {now.note}")
        elif now.step == now.total or clock - last >= SECONDS_BETWEEN_LINES:
            last = clock
            _say(f"{place}: {_state(now)}")

    return show


def _state(now: "StepReport") -> str:
    left = f"{_span(now.seconds_left)} left"
    return f"loss {now.loss:.4g}, lr {now.lr:.2g}, {now.atoms_per_second:,.0f} atoms/s, {left}"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


def _announce(settings: TrainSettings) -> None:
    stages = ", ".join(f"{stage.name} {stage.steps:,}" for stage in settings.stages)
    _say(
        f"training {settings.facts.name}: {settings.model.n_parameters():,} parameters, "
        f"steps: {stages}; run in {settings.run.directory}"
    )


def _tell(settings: TrainSettings, outcome: "TrainOutcome", *, as_json: bool) -> None:
    """Say how far the run came and where everything is."""
    if as_json:
        result = asdict(outcome) | {
            "directory": str(outcome.directory),
            "model": None if outcome.model is None else str(outcome.model),
            "steps": settings.steps,
        }
        _print_document("train", settings, result)
    for name, value in outcome.metrics.items():
        _say(f"{name} = {value:.6g}")
    _say(f"metrics: {outcome.directory / METRICS}")
    if outcome.model is not None:
        _say(f"model: {outcome.model}")
    if outcome.finished:
        _say(f"finished after {outcome.step:,} steps")
        return
    done = f"stopped and saved after {outcome.step:,} of {settings.steps:,} steps"
    _say(f"{done}; the same command goes on from there")


def _print_document(command: str, settings: TrainSettings, result: dict[str, Any]) -> None:
    print_json(
        {
            "coset": coset.__version__,
            "command": command,
            "settings": asdict(settings),
            "results": [result],
        }
    )


def _show_plan(planned: Plan, device: torch.device) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("parameters", f"{planned.parameters:,}")
    facts.add_row(
        "memory",
        f"{_size(planned.memory_bytes)} for weights, gradients, Adam and averaged weights; "
        "activations come on top",
    )
    facts.add_row(
        "operations",
        f"{planned.forward_flop_per_atom:.3g} FLOP per atom and evaluation of the energy "
        f"(estimate: {planned.kept_neighbors:.3g} kept neighbors)",
    )
    console.print(facts)
    table = result_table("stage", "steps", "structures seen", "hours (estimate)")
    for stage in planned.stages:
        table.add_row(
            stage.name, f"{stage.steps:,}", f"{stage.structures:,}", _rounded(stage.hours)
        )
    table.add_row("all", f"{planned.steps:,}", f"{planned.structures:,}", _rounded(planned.hours))
    console.print(table)
    _say(
        f"Hours are a rough estimate for one {device.type} process of this machine, right within "
        f"a factor of about two: twice the matrix products at {planned.flop_per_s / 1e9:.3g} "
        "GFLOP/s, measured now in float32."
    )


def _show_stores(stores: Sequence[StoreSize], valid: Sequence[StoreSize], planned: Plan) -> None:
    table = result_table("store", "for", "structures", "atoms", "on disk", "passes")
    rows = [("train", *pair) for pair in zip(stores, planned.passes, strict=True)]
    rows += [("valid", store, math.nan) for store in valid]
    for purpose, store, passes in rows:
        if not store.problem:
            counts = f"{store.structures:,}", f"{store.atoms:,}", _size(store.bytes)
            table.add_row(Path(store.path).name, purpose, *counts, _rounded(passes))
    if table.row_count:
        console.print(table)
    for store in (*stores, *valid):
        if store.problem:
            console.print(f"{store.path}: {store.problem}", style="yellow", soft_wrap=True)


def _rounded(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"
