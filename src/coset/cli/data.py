"""coset data: labelled structures into a store, and what a store holds."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import coset
from coset.ase_interface.training import LabelReading
from coset.cli.common import (
    NOT_CONVERGED,
    JsonOption,
    console,
    print_json,
    progress,
    result_table,
    short,
    stopper,
)
from coset.data.audit import summary, verify
from coset.data.convert import ConvertSettings, Report, convert, split_store
from coset.data.formula import HELD_OUT
from coset.data.sources import open_source
from coset.data.store import SHARD_BYTES
from coset.errors import ConfigError
from coset.units import ANGSTROM_PER_UNIT, EV_PER_UNIT

STOPPING = "stopping; the same command goes on after the last full shard"

data = typer.Typer(help="Training data: make, split, check and describe stores.")


class Part(StrEnum):
    """Which formulas are written."""

    train = "train"
    valid = "valid"
    all = "all"


class StressSign(StrEnum):
    """What is positive."""

    tension = "tension"
    compression = "compression"


StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a store.")]
DirectoryOption = Annotated[Path, typer.Option("--output", "-o", help="Directory to make.")]
HeldOutOption = Annotated[
    float, typer.Option(help="Share of formulas for validation; 0.1 is the usual bucket 0 of 10.")
]


@data.command("convert")
def convert_sources(
    sources: Annotated[
        list[str], typer.Argument(help="Corpus files (.npz), stores, and any file that ASE reads.")
    ],
    output: DirectoryOption,
    split: Annotated[
        Part, typer.Option(help="train leaves out the formulas held out, valid takes only them.")
    ] = Part.all,
    held_out: HeldOutOption = HELD_OUT,
    kind: Annotated[
        str, typer.Option(help="What the frames are called; default: the name of their file.")
    ] = "",
    license: Annotated[str, typer.Option(help="License of the labels, for the manifest.")] = "",
    citation: Annotated[str, typer.Option(help="Whom to cite, for the manifest.")] = "",
    energy_unit: Annotated[
        str, typer.Option(help=f"Of an ASE file: {', '.join(EV_PER_UNIT)}.")
    ] = "eV",
    length_unit: Annotated[
        str, typer.Option(help=f"Of an ASE file: {', '.join(ANGSTROM_PER_UNIT)}.")
    ] = "A",
    stress_sign: Annotated[
        StressSign, typer.Option(help="What is positive in the file; ASE's sign is tension.")
    ] = StressSign.tension,
    label_prefix: Annotated[
        str | None,
        typer.Option(help="Of the names of the labels, as REF_; default: none, dft_ or REF_."),
    ] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SYMBOL=EV", help="Added to the energy for each atom of it; may be repeated."
        ),
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = SHARD_BYTES,
    as_json: JsonOption = False,
) -> None:
    """Write labelled structures to a store; the same command goes on where it was stopped."""
    reading = LabelReading(
        energy_unit=energy_unit,
        length_unit=length_unit,
        stress_sign=stress_sign.value,
        prefix=label_prefix,
    )
    settings = ConvertSettings(
        split=split.value,
        held_out=held_out,
        shifts=dict(map(_shift, shift or ())),
        shard_bytes=shard_bytes,
    )
    facts = {k: v for k, v in (("license", license), ("citation", citation)) if v}
    opened = [open_source(path, kind=kind, facts=facts, reading=reading) for path in sources]
    with _chunks(len(opened), "converting") as update:
        report = convert(opened, output, settings, update)
    told = {"split": settings.split, "held_out": held_out, "shifts": dict(settings.shifts)}
    _tell("convert", told | asdict(reading), [(output, report)], as_json=as_json)


@data.command()
def info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what a store holds: structures, elements, kinds, labels, forces, licenses, size."""
    facts = summary(store)
    if as_json:
        print_json(facts)
        return
    kinds, elements = facts.pop("kinds"), facts.pop("elements")
    facts["sources"] = [source["name"] for source in facts["sources"]]
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        if value not in ("", [], {}):
            grid.add_row(key.replace("_", " "), _text(value))
    grid.add_row("elements", " ".join(f"{k} {v['structures']:,}" for k, v in elements.items()))
    console.print(grid)
    table = result_table("kind", "structures", "license")
    for one in kinds:
        table.add_row(one["name"], f"{one['structures']:,}", one.get("license", "-"))
    console.print(table)


@data.command("verify")
def verify_store(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Check every file and record of a store against what was written."""
    with progress(100, "checking, percent") as show:
        problems = verify(store, lambda done, n: show(100 * done // n, f"{done:,} of {n:,} frames"))
    if as_json:
        status = "failed" if problems else "ok"
        result = {"store": str(store), "status": status, "problems": problems}
        print_json({"coset": coset.__version__, "command": "data verify", "results": [result]})
    for problem in problems:
        console.print(problem, style="yellow", soft_wrap=True)
    console.print(f"{store} is {'damaged' if problems else 'sound'}", soft_wrap=True)
    raise typer.Exit(NOT_CONVERGED if problems else 0)


@data.command("split")
def split_in_two(
    store: StoreArgument,
    output: DirectoryOption,
    held_out: HeldOutOption = HELD_OUT,
    as_json: JsonOption = False,
) -> None:
    """Part a store by formula into OUTPUT/train and OUTPUT/valid."""
    parts = output / "train", output / "valid"
    with _chunks(1, "splitting") as update:
        reports = split_store(store, *parts, held_out, update)
    settings = {"held_out": held_out}
    _tell("split", settings, list(zip(parts, reports, strict=True)), as_json=as_json)


@contextmanager
def _chunks(total: int, what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress over the sources; leaves between two chunks when a signal has come."""
    start = time.monotonic()
    with stopper(STOPPING) as flag, progress(total, what) as show:

        def update(done: int, n_frames: int) -> None:
            if flag.code:
                raise typer.Exit(flag.code)
            rate = n_frames / max(time.monotonic() - start, 1e-3)
            show(done, f"{n_frames:,} frames, {rate:,.0f}/s")

        yield update


def _shift(text: str) -> tuple[str, float]:
    """Symbol and eV of a shift such as Ge=-0.14."""
    symbol, _, value = text.partition("=")
    try:
        return symbol, float(value)
    except ValueError:
        raise ConfigError(f"--shift {text}: expected SYMBOL=EV", field="shift") from None


def _tell(
    command: str,
    settings: dict[str, Any],
    stores: Sequence[tuple[Path, Report]],
    *,
    as_json: bool,
) -> None:
    """Counts of what was written and what was not, for a reader or a script."""
    if as_json:
        results = [{"store": str(p), "status": "ok", **r.counts()} for p, r in stores]
        document = {"coset": coset.__version__, "command": f"data {command}"}
        print_json(document | {"settings": settings, "results": results})
    for path, report in stores:
        for what, counts in (("skipped", report.skipped), ("left out", report.dropped_labels)):
            for reason, count in counts.items():
                example = f", first {report.examples[reason]}" if reason in report.examples else ""
                line = f"{what} {count:,}: {reason}{example}"
                console.print(line, style="yellow", soft_wrap=True)
        labels = ", ".join(f"{n:,} {label}" for label, n in report.labels.items() if n)
        console.print(
            f"wrote {path}: {report.written:,} of {report.read:,} structures, "
            f"{report.atoms:,} atoms, {len(report.elements)} elements; {labels}",
            soft_wrap=True,
        )


def _text(value: object) -> str:
    match value:
        case dict():
            return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
        case list():
            return "\n".join(_text(item) for item in value)
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return short(value) if abs(value) < 10.0 else f"{value:,.1f}"
    return str(value)
