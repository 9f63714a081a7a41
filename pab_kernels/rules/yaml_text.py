"""YAML as configs need it: what is hostile or ambiguous in it is refused before anything is built of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..extras import require
from ..messages import joined, shortened

MOST_CHARACTERS = 2**16
MOST_VALUES = 10_000
"""With those of an alias counted wherever it stands: nine lines of aliases of aliases are a billion values."""
MOST_LEVELS = 32


@dataclass
class _Open:
    """A list or mapping whose end was not read yet."""

    anchor: str | None
    mapping: bool
    values: int = 1
    children: int = 0
    names: set[str] = field(default_factory=set)


def from_yaml(text: str) -> Any:
    """The data of a YAML document.

    Raises:
        ValueError: it is not YAML, is longer, deeper or holds more values than a config needs, refers to itself, or
        names a field twice. ModuleNotFoundError: PyYAML is not installed.
    """
    yaml: Any = require("yaml", "reading YAML files")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"it has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read of YAML: write a longer config as "
            "JSON"
        )
    try:
        _check(yaml, text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(joined(error)) from None
    except (OverflowError, TypeError) as error:  # a date of another century, a number of another base
        raise ValueError(f"a value cannot be read: {error}") from None


def _check(yaml: Any, text: str) -> None:
    """Read the document event by event, which takes no stack and no more memory than its longest branch."""
    events = yaml.events
    sizes: dict[str, int] = {}  # by anchor
    branch = [_Open(None, mapping=False)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, events.CollectionEndEvent):
            done = branch.pop()
            size, anchor = done.values, done.anchor
        elif isinstance(event, events.CollectionStartEvent):
            if len(branch) > MOST_LEVELS:
                raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
            branch.append(_Open(event.anchor, isinstance(event, events.MappingStartEvent)))
            continue
        elif isinstance(event, events.AliasEvent):
            size, anchor = sizes.get(event.anchor, 0), None
            if any(opened.anchor == event.anchor for opened in branch):
                raise ValueError(f"the alias *{shortened(event.anchor)} refers to what it is a part of")
        elif isinstance(event, events.ScalarEvent):
            size, anchor = 1, event.anchor
            _check_name(branch[-1], event.value)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        branch[-1].children += 1
        branch[-1].values += size
        if branch[-1].values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, counted where its aliases stand")


def _check_name(inside: _Open, name: str) -> None:
    """Refuse a second name in a mapping, of which PyYAML takes the last: names and values take turns."""
    if inside.mapping and inside.children % 2 == 0:
        if name in inside.names:
            raise ValueError(f"{shortened(repr(name))} occurs twice")
        inside.names.add(name)
