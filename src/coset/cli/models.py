"""coset info, coset models: what a model is, and which ones there are."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markdown import Markdown
from rich.table import Table

from coset.ase_interface.labels import symbols_of
from coset.catalog import DEFAULT_MODEL, download, list_models, model_card, model_path
from coset.catalog import load_model as read_model
from coset.checkpoint import Checkpoint
from coset.cli.common import (
    JsonOption,
    ModelOption,
    console,
    print_json,
    result_table,
)

models = typer.Typer(help="Models known by name: what they are, where they lie, how to get them.")


@models.callback(invoke_without_command=True)
def list_all(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the models known by name."""
    if context.invoked_subcommand is not None:
        return
    rows = list_models()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = result_table(
        "name", "size", "elements", "level of theory", "trained on", "license", "from"
    )
    for row in rows:
        place = "embedded" if row.embedded else row.repository
        facts = str(row.elements), row.level_of_theory, row.training_data, row.license, place
        table.add_row(row.key, row.size, *facts)
    console.print(table)
    console.print("coset models get NAME downloads one (with --sha256 where none is recorded)")


@models.command()
def get(
    name: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    sha256: Annotated[str, typer.Option(help="Expected content, where the table has none.")] = "",
) -> None:
    """Download a model and verify its content."""
    console.print(f"{download(name, sha256=sha256)}")


@models.command()
def path(name: Annotated[str, typer.Argument(help="NAME@VERSION.")]) -> None:
    """Say where a model lies on this machine."""
    typer.echo(model_path(name))


def info(
    model: Annotated[str | None, typer.Argument(help="Model directory, .ckpt or name.")] = None,
    model_option: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is: size, elements, targets, level of theory, license, errors."""
    checkpoint = read_model(model or model_option or DEFAULT_MODEL)
    facts, card = facts_of(checkpoint), model_card(checkpoint)
    if as_json:
        print_json(facts | {"card": card})
        return
    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        if value not in ("", None, [], (), {}):
            table.add_row(key.replace("_", " "), _text(value))
    console.print(table)
    if card:
        console.print(Markdown(card))


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything a user asks about a model, as JSON."""
    hypers, provenance = checkpoint.hypers, asdict(checkpoint.provenance)
    return {
        "name": provenance.pop("name"),
        "parameters": hypers.n_parameters(),
        "elements": " ".join(symbols_of(hypers.atomic_types)),
        "cutoff_A": hypers.cutoff.cutoff,
        "adaptive_cutoff": hypers.cutoff.adaptive,
        "neighbors": hypers.cutoff.n_neighbors,
        "targets": {
            target.name: f"{target.quantity} {checkpoint.level_of_theory(target.name)}".strip()
            for target in hypers.targets
        },
        "charge_and_spin": hypers.conditioning is not None,
        "network": asdict(hypers.network),
        **provenance,
        "uncertainty": bool(checkpoint.llpr),
        "measured": dict(checkpoint.card),
        "sha256": checkpoint.sha256,
    }


def _text(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
