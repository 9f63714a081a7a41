"""`pab doctor`: the same as `python -m pab_kernels.doctor`, which does not need typer."""

from ..doctor import print_report
from .arguments import AsJson


def command(as_json: AsJson = False) -> None:
    """Show versions, devices, which backend serves which operation and why others do not, and Triton's cache."""
    print_report(as_json)
