"""Rules for blocks where two streams have the same shape: which output continues which input cannot be known, and is
not guessed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.works_with.combination import FLUX, STEPS, check, run, same

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use


def _equal(seed: int) -> dict[str, Any]:
    """As many tokens of text as of the image."""
    inputs = FLUX.inputs(seed)
    ids = inputs["img_ids"]
    text = torch.randn(1, len(ids), 6, generator=torch.Generator().manual_seed(seed))
    return inputs | {"encoder_hidden_states": text, "txt_ids": ids}


SUBJECT = replace(FLUX, inputs=_equal)
HALF = PABConfig(block=Broadcast(2, (0, 1)))


def test_a_rule_for_blocks_is_refused_at_the_first_call() -> None:
    model = SUBJECT.build()
    plain = run(SUBJECT, model)
    pab.enable(model, HALF, num_steps=STEPS)
    refusal = (
        r"transformer_blocks.0: output 0 .* continues 2 of its inputs.*enable\(model, "
        r"kinds={'transformer_blocks.0': None}\)"
    )
    with pytest.raises(TypeError, match=refusal):
        SUBJECT.call(model, 0)
    assert pab.summary(model).cache_bytes == 0
    pab.disable(model)
    assert same(run(SUBJECT, model), plain)


def test_rules_for_sublayers_need_no_such_pairs() -> None:
    check(SUBJECT, lambda model: None)
