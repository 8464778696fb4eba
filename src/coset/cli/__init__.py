"""The command line: a thin shell over the library."""

import sys
from types import TracebackType

import typer

from coset.cli.common import BAD_INPUT, CANNOT_WRITE, INTERRUPTED, MISSING_EXTRA, USAGE, console
from coset.cli.convert import convert
from coset.cli.doctor import doctor
from coset.cli.evaluate import evaluate
from coset.cli.models import info, models
from coset.cli.relax import relax
from coset.errors import CheckpointError, ConfigError, CosetError, MissingExtraError

app = typer.Typer(
    name="coset",
    help="Unconstrained machine-learned interatomic potentials, with symmetry restored.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(evaluate)
app.command()(relax)
app.command()(convert)
app.command()(info)
app.add_typer(models, name="models")
app.command()(doctor)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    command = typer.main.get_command(app)
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    if len(arguments) < len(sys.argv) - 1:
        command(args=arguments)
        return
    sys.excepthook = _one_line
    try:
        command(args=arguments)
    except CosetError as error:
        console.print(f"[red]error[/] ({error.code}): {error}", soft_wrap=True)
        sys.exit(_code_of(error))
    except OSError as error:
        console.print(f"[red]error[/]: {error}", soft_wrap=True)
        sys.exit(CANNOT_WRITE)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(INTERRUPTED)


def _one_line(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """What is shown for a bug, without --debug."""
    console.print(f"[red]internal error[/] {kind.__name__}: {error}", soft_wrap=True)
    console.print("run the command with --debug to see where, and please report it")


def _code_of(error: CosetError) -> int:
    if isinstance(error, MissingExtraError):
        return MISSING_EXTRA
    if isinstance(error, CheckpointError):
        return BAD_INPUT
    return USAGE if isinstance(error, ConfigError) else BAD_INPUT
