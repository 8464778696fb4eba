"""coset convert: a foreign checkpoint to our format."""

from pathlib import Path
from typing import Annotated

import typer

from coset.catalog import load_model as read_model
from coset.checkpoint import save_checkpoint
from coset.cli.common import ForceOption, JsonOption, console, print_json
from coset.cli.models import facts_of
from coset.loading import in_half_precision, with_converged_cutoff
from coset.metatrain_check import compare_with_metatrain


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A metatrain or upet .ckpt file, or a model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory, or file.zip.")],
    converged: Annotated[
        bool,
        typer.Option(
            "--converged", help="Replace the ten-step adaptive cutoff by its exact root (recorded)."
        ),
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Store the weights in float16: half the size.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with metatrain, if it is installed.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a foreign checkpoint; nothing in it is executed."""
    read = read_model(checkpoint)
    parity = compare_with_metatrain(checkpoint, read) if verify else None
    wanted = with_converged_cutoff(read) if converged else read
    save_checkpoint(in_half_precision(wanted) if half else wanted, output, overwrite=force)
    if as_json:
        print_json(facts_of(read_model(output)) | {"output": str(output), "parity": parity})
        return
    for key, value in (parity or {}).items():
        console.print(f"largest difference from metatrain, {key}: {value:.2e}")
    console.print(f"wrote {output}")
