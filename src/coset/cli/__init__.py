"""The command line: a thin shell over the library."""

import sys
import traceback
from types import TracebackType
from typing import Annotated

import typer

from coset import __version__
from coset.cli.bench import bench
from coset.cli.common import (
    BAD_INPUT,
    CANNOT_WRITE,
    MISSING_EXTRA,
    NOT_CONVERGED,
    USAGE,
    console,
    print_json,
)
from coset.cli.conductivity import conductivity
from coset.cli.convert import convert
from coset.cli.data import data
from coset.cli.diagnose import diagnose
from coset.cli.doctor import doctor
from coset.cli.elastic import elastic
from coset.cli.eos import eos
from coset.cli.evaluate import evaluate
from coset.cli.hull import hull
from coset.cli.models import info, models
from coset.cli.phonons import phonons
from coset.cli.relax import relax
from coset.cli.train import plan, train
from coset.errors import ConfigError, CosetError, MissingExtraError, NotConvergedError

app = typer.Typer(
    name="coset",
    help="Unconstrained machine-learned interatomic potentials, with symmetry restored.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Unconstrained machine-learned interatomic potentials, with symmetry restored."""
    if version:
        typer.echo(f"coset {__version__}")
        raise typer.Exit


app.command()(evaluate)
app.command()(relax)
app.command()(elastic)
app.command()(eos)
app.command()(phonons)
app.command()(conductivity)
app.command()(hull)
app.command()(bench)
app.command()(diagnose)
app.command()(train)
app.command()(plan)
app.command()(convert)
app.command()(info)
app.add_typer(models, name="models")
app.add_typer(data, name="data")
app.command()(doctor)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    command = typer.main.get_command(app)
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        sys.excepthook = _one_line
    try:
        command(args=arguments)
    except CosetError as error:
        _report(error, error.code, str(error), arguments, debug=debug)
        sys.exit(_code_of(error))
    except OSError as error:
        _report(error, "CannotWrite", str(error), arguments, debug=debug)
        sys.exit(CANNOT_WRITE)


def _report(error: Exception, code: str, text: str, arguments: list[str], *, debug: bool) -> None:
    """One line on standard error, and the JSON document where one was asked for."""
    if debug:
        traceback.print_exception(error)
    console.print(f"error ({code}): {text}", style="red", soft_wrap=True)
    if "--json" in arguments:
        problem = {"code": code, "reason": text}
        print_json({"coset": __version__, "error": problem, "results": []})


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """What is shown for a bug, without --debug."""
    console.print(f"internal error {kind.__name__}: {error}", style="red", soft_wrap=True)
    console.print("run the command with --debug to see where, and please report it")


def _code_of(error: CosetError) -> int:
    if isinstance(error, MissingExtraError):
        return MISSING_EXTRA
    if isinstance(error, NotConvergedError):
        return NOT_CONVERGED
    return USAGE if isinstance(error, ConfigError) else BAD_INPUT
