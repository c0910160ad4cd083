"""The command line. Data on stdout, progress and logs on stderr.

Exit codes: 0 done, 1 a check found a difference, 2 bad usage or bad input, 3 the environment lacks
something. An error is one line on stderr: place, code, cause, remedy.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

import pcc
from pcc.cli import (
    bundles,
    choose,
    conformance,
    environment,
    explore,
    generation,
    passes,
    refit,
    sources,
    training,
)
from pcc.cli.output import say
from pcc.errors import PccError

app = typer.Typer(
    name="pcc",
    help="Compile probabilistic circuits to ONNX. Exit codes: 0 done, 1 a check found a "
    "difference, 2 bad usage or bad input, 3 the environment lacks something.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (
    sources, refit, bundles, generation, passes, training, explore, choose, conformance,
    environment,
):  # fmt: skip
    part.register(app)


def _version(value: bool) -> None:
    if value:
        print(f"pcc {pcc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Compile probabilistic circuits to ONNX."""


# What typer raises for bad usage; its base class has no public name of its own.
Usage: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _stop)
    if hasattr(signal, "SIGPIPE"):  # `pcc inspect .. | head` ends like any other program
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(app(prog_name="pcc", standalone_mode=False) or 0)
    except Usage as e:
        misused(e)
    except PccError as e:
        fail(e)
    except OSError as e:  # a full disk, a folder without permission: no fault of the program
        at = str(e.filename or "")
        fail(PccError("C120", f"the system refuses: {e.strerror or e}", at=at))
    except MemoryError:
        fail(PccError("C121", "there is not enough memory", hint="use smaller inputs"))
    except KeyboardInterrupt:
        sys.exit(130)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Unwind, so that nothing half-written stays behind; a second signal ends at once."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def misused(e: Exception) -> None:
    """Say in one line what is wrong with the arguments; without any, print the help."""
    if type(e).__name__ == "NoArgsIsHelpError":
        e.show()  # type: ignore[attr-defined]
        sys.exit(2)
    context = getattr(e, "ctx", None)
    name = context.command_path if context else "pcc"
    fail(PccError("C100", e.format_message(), hint=f"{name} -h"))  # type: ignore[attr-defined]


def fail(e: PccError) -> None:
    """Print an error as one line and exit with its code."""
    hint = f" (help: {e.hint})" if e.hint else ""
    place = f"{e.at}: " if e.at else ""
    line = f"{place}error[{e.code}]: {e.what}{hint}"
    say(" ".join(line.split()))
    sys.exit(e.exit_code)
