"""JSON as its standard defines it, read and written."""

from __future__ import annotations

import json
import math

import pytest

from pab_kernels.strict_json import from_json, to_json


def test_json_is_strict_both_ways() -> None:
    data = {"a": [1.5, math.nan, math.inf], "b": {"c": (-math.inf, None, True)}}
    text = to_json(data)
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, None], "b": {"c": [None, None, True]}}
    assert from_json(text)["a"] == [1.5, None, None]
    for bad, message in (
        ("[NaN]", "NaN is not a number of JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 10**5, "nested too deep"),
        ("{", "Expecting property name"),
    ):
        with pytest.raises(ValueError, match=message):
            from_json(bad)
