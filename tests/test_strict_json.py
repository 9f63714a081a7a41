"""JSON as its standard defines it."""

from __future__ import annotations

import json
import math

import pytest

from pab_kernels.strict_json import to_json


def test_numbers_that_are_not_finite_are_null() -> None:
    text = to_json({"a": [1.5, math.nan, math.inf], "b": {"c": (-math.inf, None, True)}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, None], "b": {"c": [None, None, True]}}
