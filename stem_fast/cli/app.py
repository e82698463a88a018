"""The ``stem-fast`` command: what its commands share."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from stem_fast import __version__
from stem_fast.cli import report
from stem_fast.common import DataError
from stem_fast.training import fit as training

SMALLER = (
    "fit a smaller network with a lower --embedding-dim, --expert-hidden-units or "
    "--num-shared-experts, or a higher --min-count"
)


class _Commands(TyperGroup):
    """Makes every refusal one line on stderr and exit code 2, and Ctrl-C exit code 130."""

    def main(self, *args: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False  # else typer prints its own, longer, errors
        try:
            with warnings.catch_warnings():
                warnings.showwarning = report.warning
                code = super().main(*args, **extra)
        except (DataError, training.TrainingError, OSError) as error:
            report.error(str(error))
            code = 2
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            reason, _, _ = str(error).partition("\n")
            report.error(
                "out of memory: lower --batch-size, give fit a --micro-batch-size, or "
                f"{SMALLER} ({reason})."
            )
            code = 2
        except Exception as error:
            # Usage errors: their class has moved between releases of typer, this method has not.
            if not hasattr(error, "format_message"):
                raise
            if message := error.format_message():  # empty where the help has been printed
                report.error(message + _value(error))
            code = 2
        sys.exit(code or 0)


def _value(error: Exception) -> str:
    """The value that a usage error is about, where releases of typer by pydantic leave it out."""
    cause: Any = error.__cause__
    found = cause.errors() if hasattr(cause, "errors") else []
    return f": {found[0]['input']!r}" if found else ""


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """torch has a class for the memory of GPUs only; its CPU allocator is known by its words."""
    words = ("DefaultCPUAllocator", "not enough memory")
    classes = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, classes) or any(word in str(error) for word in words)


app = typer.Typer(
    cls=_Commands,
    help="Multi-task recommenders around STEM-Net: fit, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        report.console().print(f"stem_fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="print it", is_eager=True, callback=_version, metavar=""),
    ] = False,
) -> None:
    pass
