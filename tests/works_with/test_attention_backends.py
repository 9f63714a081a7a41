"""Attention backends that diffusers sets: on the model, and around calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

import pab_kernels as pab
from tests.works_with.combination import COGVIDEOX, FLUX, LATTE, STEPS, TWO, WAN, Subject, check, run

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use

BACKEND = "_native_math"


@pytest.fixture
def calls() -> Iterator[mock.Mock]:
    """Of the backend."""
    name = AttentionBackendName(BACKEND)
    wrapped = mock.Mock(wraps=_AttentionBackendRegistry._backends[name])
    with mock.patch.dict(_AttentionBackendRegistry._backends, {name: wrapped}):
        yield wrapped


@pytest.fixture(autouse=True)
def _the_default_afterwards() -> Iterator[None]:
    """`set_attention_backend` sets what other models use too."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.parametrize("subject", [WAN, FLUX, COGVIDEOX, LATTE], ids=lambda s: s.name)
def test_a_backend_set_on_the_model(subject: Subject) -> None:
    check(subject, lambda model: model.set_attention_backend(BACKEND))


@pytest.mark.parametrize("subject", [WAN, FLUX], ids=lambda s: s.name)
def test_a_backend_around_the_calls(subject: Subject) -> None:
    check(subject, lambda model: None, around=lambda: attention_backend(BACKEND))


def test_a_backend_set_on_an_enabled_model_runs_where_attention_is_computed(calls: mock.Mock) -> None:
    model: Any = WAN.build()
    pab.enable(model, TWO, num_steps=STEPS)
    model.set_attention_backend(BACKEND)
    run(WAN, model)
    number = calls.call_count  # before FLOPs are counted, which runs a copy
    contexts = pab.summary(model).contexts.values()
    assert number == sum(tallies[kind].computed for tallies in contexts for kind in ("spatial", "cross")) == 4 * STEPS
