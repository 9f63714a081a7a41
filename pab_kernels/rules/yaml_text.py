"""YAML for configs: hostile or ambiguous text is refused before any object is built from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..extras import require
from ..messages import joined, shortened

MOST_CHARACTERS = 2**16
MOST_VALUES = 10_000
"""With the values of an alias counted at each use: nine lines of nested aliases are a billion values."""
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
    """Parse a YAML document.

    Raises:
        ValueError: it is not YAML, is longer, deeper or has more values than a config needs, contains itself, or names
            a field twice.
        ModuleNotFoundError: PyYAML is not installed.
    """
    yaml: Any = require("yaml", "reading YAML files")
    if len(text) > MOST_CHARACTERS:
        limit = f"at most {MOST_CHARACTERS:,} are supported in YAML"
        raise ValueError(f"it has {len(text):,} characters; {limit}: write a longer config as JSON")
    try:
        _check(yaml, text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(joined(error)) from None
    except (OverflowError, TypeError) as error:  # an impossible date or number
        raise ValueError(f"a value cannot be read: {error}") from None


def _check(yaml: Any, text: str) -> None:
    """Check the document event by event, without recursion."""
    sizes: dict[str, int] = {}  # number of values, by anchor
    branch = [_Open(None, mapping=False)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            if len(branch) > MOST_LEVELS:
                raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
            branch.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            done = branch.pop()
            size, anchor = done.values, done.anchor
        elif isinstance(event, yaml.AliasEvent):
            size, anchor = sizes.get(event.anchor, 0), None
            if any(opened.anchor == event.anchor for opened in branch):
                raise ValueError(f"the alias *{shortened(event.anchor)} refers to what contains it")
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
            _check_name(branch[-1], event.value)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        branch[-1].children += 1
        branch[-1].values += size
        if branch[-1].values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values, counting those of an alias at each use")


def _check_name(inside: _Open, name: str) -> None:
    """Refuse a name that a mapping has already; PyYAML would use the last. Names and values alternate."""
    if inside.mapping and inside.children % 2 == 0:
        if name in inside.names:
            raise ValueError(f"{shortened(repr(name))} occurs twice")
        inside.names.add(name)
