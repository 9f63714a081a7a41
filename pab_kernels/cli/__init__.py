"""The command line `pab`: each command is the function `command` in the module of its name."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from ..extras import require
from ..streams import fail, standard_streams


def _ends_with_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with its errors printed as one line.

    Exit code 2 is for wrong input, 1 for a missing package or a resource of the machine (space, memory, permission),
    130 for Ctrl-C.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ModuleNotFoundError, MemoryError) as error:
            fail(error, 1)
        except (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            fail(error, 2)
        except BrokenPipeError:  # the reader ended first, as in `pab plan --list | head -1`
            raise SystemExit(1) from None
        except OSError as error:
            fail(error, 1)
        except KeyboardInterrupt:
            fail("interrupted", 130)

    return run


def _help(command: Callable[..., None]) -> str:
    """A command's docstring with every paragraph on one line, for typer to wrap."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")


def build_app() -> Any:
    """The typer application.

    Raises:
        ModuleNotFoundError: typer is not installed; the message has the install command.
    """
    typer = require("typer", "the command line")
    from . import analyze, calibrate, compare, demo, doctor, generate, plan

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Pyramid Attention Broadcast for diffusion transformers.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            from .. import __version__

            print(f"pab-kernels {__version__}")
            raise typer.Exit

    version = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=show_version)

    def root(version: bool = version) -> None:
        pass

    app.callback()(root)
    for module in (demo, generate, plan, analyze, calibrate, compare, doctor):
        name = module.__name__.rpartition(".")[2]
        app.command(name, help=_help(module.command))(_ends_with_one_line(module.command))
    return app


def main() -> None:
    """The console script `pab`."""
    with standard_streams():
        _ends_with_one_line(lambda: build_app()(prog_name="pab"))()
