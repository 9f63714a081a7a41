"""Options that several commands have, and values that are parsed from one text."""

from __future__ import annotations

from collections.abc import Collection
from json import JSONDecodeError
from pathlib import Path
from typing import Annotated, Any

import typer

from ..messages import shown
from ..strict_json import from_json

Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most that PAB keeps, such as 8GiB; the rest is kept in 8 bits or computed. Default: no limit.",
    ),
]
CacheDevice = Annotated[
    str | None,
    typer.Option(
        metavar="cpu",
        help="Keep outputs in host memory, with --budget as few as needed. Default: on the model's device.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if available.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on CUDA, else float32.")
]
Further = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further argument of the pipeline; repeatable.")
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Of a published model by name: its parts, in folders transformer, vae, text_encoder."
    ),
]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Do not fetch anything.")]


def numbers(
    text: str | None, option: str, separator: str, kind: type[int] | type[float], counts: Collection[int] | None = None
) -> Any:
    """Parse the numbers of an option.

    Args:
        text: the value of the option, or None.
        option: describes the expected value, for the error.
        separator: between the numbers.
        kind: of the numbers.
        counts: supported numbers of numbers; default any.

    Returns:
        The numbers as a tuple, or None if `text` is.

    Raises:
        ValueError: the value has another form.
    """
    if text is None:
        return None
    try:
        found: tuple[float, ...] = tuple(kind(part) for part in text.lower().split(separator))
    except ValueError:
        found = ()
    if not found or len(found) not in (counts or (len(found),)):
        raise ValueError(f"{option}, got {text!r}")
    return found


def named_arguments(given: list[str] | None) -> dict[str, Any]:
    """Parse `NAME=VALUE` pairs; a value that is not JSON is text.

    Raises:
        ValueError: a pair has another form, or JSON that is not strict.
    """
    arguments: dict[str, Any] = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--argument takes NAME=VALUE such as height=256, got {shown(pair)}")
        try:
            arguments[name] = from_json(value)
        except JSONDecodeError:
            arguments[name] = value
        except ValueError as error:
            raise ValueError(f"--argument {name}: {error}") from None
    return arguments
