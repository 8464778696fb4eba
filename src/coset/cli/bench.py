"""coset bench: a named protocol against reference data, with records that resume."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import coset
from coset.cli.common import (
    STOPPED,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    Session,
    TargetOption,
    ThreadsOption,
    attempt,
    console,
    exit_code,
    open_session,
    print_json,
    progress,
    report_problems,
    result_table,
    stopper,
)
from coset.cli.folders import write_record
from coset.errors import ConfigError
from coset.protocols import COMPLETE, PROTOCOLS
from coset.protocols.manifest import Manifest, manifest_of
from coset.protocols.metrics import GROUPS
from coset.protocols.records import Benchmark, Metric, Published, Row
from coset.protocols.runs import run_benchmark

Name = StrEnum("Name", {name: name for name in PROTOCOLS})  # type: ignore[misc]
NOTICE = "stopping after this material; the same command goes on"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What a benchmark came to; total: how many materials were asked for."""

    rows: tuple[Row, ...]
    total: int
    metrics: tuple[Metric, ...]
    published: tuple[Published, ...]


class _Pace:
    """How long the rest will take at the pace of this run."""

    def __init__(self, *, total: int) -> None:
        """The clock starts now."""
        self.total, self.start, self.measured = total, time.monotonic(), 0

    def note(self, done: int, last: Row | None) -> str:
        """The last material and the time left, empty before the first."""
        if last is None:
            return ""
        self.measured += 1
        minutes = (time.monotonic() - self.start) / self.measured * (self.total - done) / 60.0
        return f"{last.formula} {last.status}, {minutes:.0f} min left"


def bench(
    name: Annotated[Name, typer.Argument(help="Which protocol.")],
    data: Annotated[Path, typer.Option(help="Folder of the reference data.")],
    model: ModelOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All materials, not only the fixed subset.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many, for a quick look.")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw parity plots.")] = False,
    target: TargetOption = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder of the records; default: bench-NAME."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float64,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model with a named protocol; the same command goes on where it stopped."""
    benchmark = _chosen(name.value, everything=everything)
    session = open_session(model, target=target, device=device, dtype=dtype, threads=threads)
    manifest = manifest_of(
        benchmark, data, session.model | session.settings, session.potential.baseline.device
    )
    folder = Path(output or f"bench-{name.value}")
    entries = benchmark.entries(data)[:limit]
    pace = _Pace(total=len(entries))
    with stopper(NOTICE) as flag, progress(len(entries), name.value) as update:
        watch = flag.watch(update)

        def observer(done: int, last: Row | None) -> bool:
            return watch(done, pace.note(done, last))

        rows = run_benchmark(
            benchmark, session.potential, manifest, entries, folder, observer=observer
        )
    run = _Run(
        rows=rows,
        total=len(entries),
        metrics=benchmark.summary(rows),
        published=benchmark.published(data, [row.key for row in rows if row.status == "ok"]),
    )
    records = [_record(row) for row in rows]
    facts = _facts(session, manifest, run)
    if as_json:
        print_json(facts | {"results": records})
    _show(run, session.model["name"], manifest)
    report_problems(records)
    code = attempt(lambda: _write(folder, facts, benchmark, rows, plot=plot))
    unfinished = STOPPED if len(rows) < len(entries) else exit_code(records)
    raise typer.Exit(code or unfinished)


def _chosen(name: str, *, everything: bool) -> Benchmark:
    if not everything:
        return PROTOCOLS[name]()
    if name not in COMPLETE:
        raise ConfigError(f"--all: {name} has no subset, it takes all materials", field="all")
    return COMPLETE[name]()


def _record(row: Row) -> dict[str, Any]:
    """The fields that every result has, and the values by name."""
    return {
        "input": row.key,
        "index": 0,
        "formula": row.formula,
        "n_atoms": row.n_atoms,
        "status": row.status,
        "code": row.code,
        "reason": row.reason,
        "warnings": [],
        "unseen": row.unseen,
        "seconds": row.seconds,
        "values": {v.name: {"own": v.own, "reference": v.reference} for v in row.values},
    }


def _facts(session: Session, manifest: Manifest, run: _Run) -> dict[str, Any]:
    """The document without the results."""
    return {
        "coset": coset.__version__,
        "command": "bench",
        "model": session.model,
        "settings": session.settings | {"protocol": manifest.protocol} | dict(manifest.settings),
        "settings_sha256": manifest.settings_sha256,
        "manifest_sha256": manifest.sha256,
        "manifest": manifest.document(),
        "n_materials": run.total,
        "n_done": len(run.rows),
        "metrics": [asdict(one) for one in run.metrics],
        "published": [asdict(one) for one in run.published],
    }


def _show(run: _Run, model: str, manifest: Manifest) -> None:
    console.print(
        f"{manifest.protocol}, {model}: {len(run.rows)} of {run.total} materials, "
        f"settings {manifest.settings_sha256[:12]}, manifest {manifest.sha256[:12]}"
    )
    names = list(dict.fromkeys(metric.name for metric in run.metrics))
    found = {(metric.name, metric.group): metric for metric in run.metrics}
    if names:
        table = result_table("metric", *GROUPS)
        for name in names:
            table.add_row(name, *(_cell(found.get((name, group))) for group in GROUPS))
        console.print(table)
    if run.published and run.rows:
        compared = [metric.name for metric in run.published[0].metrics]
        table = result_table("published", *compared)
        table.add_row(f"{model} (here)", *(_cell(found.get((name, "all"))) for name in compared))
        for one in run.published:
            table.add_row(one.name, *(_cell(metric) for metric in one.metrics))
        console.print(table)


def _cell(metric: Metric | None) -> str:
    return "-" if metric is None else f"{metric.value:.4g} ({metric.count})"


def _write(
    folder: Path, facts: dict[str, Any], benchmark: Benchmark, rows: Sequence[Row], *, plot: bool
) -> list[str]:
    write_record(folder / "summary.json", facts)
    written = [str(folder / "summary.json")]
    if plot and rows:
        from coset.analysis.plots import save_figure  # noqa: PLC0415  # matplotlib: half a second
        from coset.analysis.protocol_plots import parity_figure  # noqa: PLC0415

        path = folder / "parity.png"
        save_figure(parity_figure(rows, benchmark), path)
        written.append(str(path))
    return written
