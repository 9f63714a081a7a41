"""`python -m bench.memory`: its roundings, and the row of the outputs of a kind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from bench import memory


@pytest.mark.parametrize("name", [*memory.SLOTS, *memory.OTHERS])
def test_every_rounding_is_as_close_as_its_bits_allow(name: str) -> None:
    bits, rounding = (memory.SLOTS | memory.OTHERS)[name]
    x = torch.randn(50, 144, generator=torch.Generator().manual_seed(0))
    close = memory.decibels(x, rounding(x) - x)
    assert (30 if bits > 8 else 16) < close < (45 if bits > 8 else 25)
    zeros = torch.zeros(2, 3, 40)
    assert torch.equal(rounding(zeros), zeros) and rounding(x).shape == x.shape


def test_channels_that_stand_out_are_found() -> None:
    x = torch.randn(60, 96, generator=torch.Generator().manual_seed(0))
    x[:, 40] *= 50
    row = memory.of_outputs("mlp", [x[:30], x[30:]])
    assert row["channels"] == 96 and row["groups"] == 3 and row["largest_over_median"] > 20
    assert row["worst_group_value_share"] > 0.9 and row["worst_group_error_share"] > 0.9
    apart, kept = row["decibels"]["1 in 32 channels apart, 32"], row["decibels"]["int4, 32"]
    assert apart > kept + 10


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench.memory", "--parts", "slots,speed"])
    with pytest.raises(SystemExit):
        memory.main()
    assert "got part 'speed'; supported are slots, outputs, roundings" in capsys.readouterr().err
