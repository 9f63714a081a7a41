"""`pab doctor`: the same as `python -m pab_kernels.doctor`, which needs no typer."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

from typing import Annotated

import typer

from ..doctor import print_report


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Show versions, devices, which backend serves which operation and why others do not, and the cache of compiled
    kernels."""
    print_report(as_json)
