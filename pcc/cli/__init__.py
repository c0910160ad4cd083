"""The command line. Data on stdout, progress and logs on stderr.

Exit codes: 0 done, 1 a check found a difference, 2 bad usage or bad input, 3 the environment lacks
something. An error is one line on stderr: place, code, cause, remedy.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

import pcc
from pcc.cli import bundles, environment, explore, generation, passes, sources, training
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
for part in (sources, bundles, generation, passes, training, explore, environment):
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


def main() -> None:
    """Run the command line."""
    if hasattr(signal, "SIGPIPE"):  # `pcc inspect .. | head` ends like any other program
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app(prog_name="pcc")
    except PccError as e:
        fail(e)
    except OSError as e:  # a full disk, a folder without permission: no fault of the program
        at = str(e.filename or "")
        fail(PccError("C120", f"the system refuses: {e.strerror or e}", at=at))
    except MemoryError:
        fail(PccError("C121", "there is not enough memory", hint="use smaller inputs"))
    except KeyboardInterrupt:
        sys.exit(130)


def fail(e: PccError) -> None:
    """Print an error as one line and exit with its code."""
    hint = f" (help: {e.hint})" if e.hint else ""
    place = f"{e.at}: " if e.at else ""
    line = f"{place}error[{e.code}]: {e.what}{hint}"
    # Names in messages come from strangers' files: no control characters reach the terminal.
    say("".join(c if c.isprintable() else " " for c in " ".join(line.split())))
    sys.exit(e.exit_code)
