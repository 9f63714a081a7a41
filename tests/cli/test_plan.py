"""`pab plan` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("huggingface_hub")

import diffusers
import huggingface_hub as hub
import huggingface_hub.errors as errors
from typer.testing import CliRunner

from pab_kernels import cli

pytestmark = pytest.mark.usefixtures("measured_once")

SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "num_layers": 1}
GIVEN = ("--size", "5x32x48", "--steps", 14, "--text", 7)


def pab(*arguments: object) -> Any:
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )


def test_schedule_and_table_are_printed() -> None:
    result = pab("plan", "--model", "latte", "--config", "pab246", "--steps", 10)
    assert result.exit_code == 0, result.output
    for said in ("spatial  ##S.S.S.##", "without PAB", "total", "device memory"):
        assert said in result.output


def test_json_is_printed_alone() -> None:
    data = json.loads(pab("plan", "--model", "latte", "--steps", 14, "--json").stdout)
    assert data["size"] == [16, 512, 512] and data["steps"] == 14 and data["flops"] < data["flops_without"]


def test_fitted_weights_are_shown_and_those_of_another_model_are_refused(tmp_path: Path) -> None:
    row = {"reads": [[5, 4, 2]], "weights": {"blocks.0.attn": [0.4]}}
    rules = {"spatial": {"range": 2, "reuse": "linear"}, "fitted": {"num_steps": 14, "rows": [row]}}
    (tmp_path / "c.json").write_text(json.dumps(rules))
    shown = pab("plan", "--config", tmp_path / "c.json", "--steps", 14).stdout
    assert shown.splitlines()[-1] == "fitted weights of 1 sublayer(s), steps 5 to 5"
    other = pab("plan", "--config", tmp_path / "c.json", "--steps", 20).stdout
    as_json = json.loads(pab("plan", "--config", tmp_path / "c.json", "--steps", 20, "--json").stdout)
    assert len(as_json["notes"]) == 1 and f"note: {as_json['notes'][0]}" in other
    assert "note: fitted weights are for 14 steps and this schedule has 20" in other
    refused = pab("plan", "--model", "latte", "--config", tmp_path / "c.json", "--steps", 14)
    assert refused.exit_code and "'blocks.0.attn', which is no sublayer of this LatteTransformer3D" in refused.output


def test_a_budget_is_kept_printed_and_drawn(tmp_path: Path) -> None:
    options = ("plan", "--model", "latte", "--config", "pab246", "--steps", 10, "--budget", "2.5GiB")
    result = pab(*options, "--plot", tmp_path / "plan.svg")
    assert result.exit_code == 0, result.output
    for printed in ("budget 2.50 GiB, 2.", "kept in int8", "(in the budget)"):
        assert printed in result.output
    assert '<g id="budget">' in (tmp_path / "plan.svg").read_text()
    data = json.loads(pab(*options, "--json").stdout)
    assert data["peak_cache_bytes"]["budget"] == data["given_up"]["peak"] <= 2.5 * 2**30 == data["given_up"]["budget"]
    assert data["peak_cache_bytes"]["model"] > 2.5 * 2**30 and data["given_up"]["fewer_bits"]
    for refused, message in (("1KiB", "the smallest that a plan"), ("50%", "a forecast has no device")):
        assert message in pab(*options[:-1], refused).stderr
    assert "give --model too" in pab("plan", "--config", "pab246", "--steps", 10, "--budget", "1GiB").stderr


def test_host_memory_and_the_bus_are_printed_and_drawn(tmp_path: Path) -> None:
    options = ("plan", "--model", "latte", "--config", "pab246", "--steps", 10, "--cache-device", "cpu")
    result = pab(*options, "--bandwidth", 50, "--plot", tmp_path / "plan.svg")
    assert result.exit_code == 0, result.output
    data = json.loads(pab(*options, "--json").stdout)
    assert data["config"]["cache_device"] == "cpu" and data["bandwidth"] == 25e9
    assert data["peak_host_bytes"]["model"] > 8 * data["peak_cache_bytes"]["model"] > 0
    assert max(data["fetched_bytes_by_step"]) == data["peak_host_bytes"]["model"] == max(data["host_bytes_by_step"])
    for printed in (
        "host memory    5.9",
        "device memory  3.",
        f"takes {data['least_step_seconds'] / 2:.2f} s or more, at 50 GB a second each way",
    ):
        assert printed in result.output
    assert "spatial in host memory" in (tmp_path / "plan.svg").read_text()
    with_budget = pab(*options, "--budget", "4GiB").output
    assert "in host memory" in with_budget and "device memory  6.8" in with_budget
    for more, message in (
        (("--bandwidth", 0), "--bandwidth is a number above 0"),
        (("--cache-device", "disk"), "cache_device 'disk' is not known"),
    ):
        assert message in pab(*options, *more).stderr
    assert "--bandwidth" in pab("plan", "--model", "latte", "--bandwidth", 25).stderr
    assert "give --model too" in pab("plan", "--config", "pab246", "--steps", 10, "--cache-device", "cpu").stderr


RANKS = (
    "plan",
    "--model",
    "open-sora-1.2",
    "--size",
    "17x64x64",
    "--config",
    "open-sora-1.2",
    "--ranks",
    8,
    "--cfg",
    2,
)


def test_what_a_rank_sends_is_printed_by_kind_and_step() -> None:
    result, data = pab(*RANKS), json.loads(pab(*RANKS, "--json").stdout)["ranks"]
    assert result.exit_code == 0, result.output
    assert "8 rank(s): 2 branches of guidance x 4 part(s) of the frames" in result.output
    assert "sent by step" in result.output and "cache a rank" in result.output
    assert (data["ranks"], data["cfg"], data["sequence"], data["method"]) == (8, 2, 4, "frames")
    assert data["bytes"] == sum(data["bytes_by_step"]) == sum(kind["bytes"] for kind in data["kinds"].values())
    temporal = data["kinds"]["temporal"]
    assert 0 < temporal["messages"] < temporal["messages_without"] == 28 * 30 * 2
    assert data["peak_cache_bytes"]["int8"] < data["peak_cache_bytes"]["model"]
    assert json.loads(pab("plan", "--model", "latte", "--steps", 14, "--json").stdout)["ranks"] is None


def test_with_slots_of_eight_bits_outputs_travel_in_eight_bits(tmp_path: Path) -> None:
    for name, dtype in (("plain", None), ("eight", "int8"), ("four", "int4")):
        rules = {"temporal": 4} | ({"cache_dtype": dtype} if dtype else {})
        (tmp_path / f"{name}.json").write_text(json.dumps(rules))
    arguments = ("plan", "--model", "latte", "--steps", 14, "--ranks", 4, "--config")
    plain, eight, four = (
        json.loads(pab(*arguments, tmp_path / f"{name}.json", "--json").stdout)["ranks"]
        for name in ("plain", "eight", "four")
    )
    assert four == plain  # 4 bits travel in the model's dtype
    assert (plain["return_dtype"], eight["return_dtype"]) == (None, "int8") and plain["input_dtype"] is None
    assert eight["kinds"]["temporal"]["bytes"] * 2 * 2304 == plain["kinds"]["temporal"]["bytes"] * (2304 + 1188)
    assert eight["kinds"]["output"] == plain["kinds"]["output"]
    assert "outputs of attention travel in int8" in " ".join(pab(*arguments, tmp_path / "eight.json").output.split())


def test_below_twelve_steps_the_default_leaves_the_model_alone() -> None:
    for steps, reused in ((11, False), (12, True)):
        data = json.loads(pab("plan", "--model", "latte", "--steps", steps, "--json").stdout)
        assert (data["flops"] < data["flops_without"]) is reused


def test_known_models_are_listed() -> None:
    assert "open-sora-1.2" in pab("plan", "--list").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cogvideo"], "pab: there is no model 'cogvideo'; did you mean 'cogvideox-5b'"),
        (["--model", "x"], "pab: there is no model 'x'. Supported are latte, "),
        (
            ["--model", "latte", "--size", "16x510x512"],
            "pab: size 16x510x512: height 510 does not fit; multiples of 16 are supported",
        ),
        (
            ["--model", "latte", "--steps", "1001"],
            "pab: this model's scheduler has at most 1000 steps, got 1001",
        ),
        (["--model", "none/config.json"], "pab: there is no none/config.json"),
        (
            ["--model", "nobody/nothing"],
            "pab: the config of nobody/nothing is not cached and cannot be fetched: HF_HUB_OFFLINE is set; give the",
        ),
        (
            ["--model", "../nothing"],
            "pab: the config of ../nothing is not cached and cannot be fetched: this is no hub id; give the path of a",
        ),
        (["--model", "latte", "--size", "16x512"], "pab: --size takes frames x height x width"),
        (["--model", "latte", "--size", "15x512x512"], "pab: size 15x512x512: 15 frames do not fit; this model has 16"),
        (["--model", "latte", "--steps", "0"], "pab: --steps must be at least 1, got 0"),
        (["--model", "latte", "--config", "none.yaml"], "pab: there is no file none.yaml"),
        (["--model", "latte", "--config", "pab247"], "pab: there is no preset 'pab247'; did you mean 'pab246'?"),
        ([], "pab: pab plan needs --model, or --config and --steps"),
        (["--config", "pab246", "--steps", "9", "--ranks", "2"], "pab: --ranks share a model; give --model too"),
        (["--model", "latte", "--cfg", "2"], "pab: --cfg tells how many of the ranks share the branches of guidance; "),
        (["--model", "latte", "--ranks", "0"], "pab: ranks must be a whole number from 1, got 0"),
        (["--model", "latte", "--ranks", "8", "--cfg", "4"], "pab: cfg must be 1 or 2, as guidance has two branches; "),
        (["--model", "latte", "--ranks", "5", "--cfg", "2"], "pab: 5 ranks do not divide into 2 branches of guidance"),
        (["--model", "x", "--ranks", "2"], "pab: there is no model 'x'. Supported are latte, "),
        (
            ["--model", "wan2.1-1.3b", "--size", "5x32x48", "--ranks", "8"],
            "pab: 12 heads do not divide among 8 sequence ranks (all ranks / cfg); supported are 1, 2, 3, 4, 6, 12",
        ),
        (
            ["--model", "wan2.1-1.3b", "--size", "5x32x48", "--ranks", "8", "--cfg", "2"],
            "pab: cfg=2 splits the branches of guidance that share a call, but this model's call has a batch of 1; ",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = pab("plan", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith(message) and result.stderr.count("\n") == 1, result.output


@pytest.fixture
def transformer() -> Any:
    return diffusers.WanTransformer3DModel(**SMALL)


def planned(model: Path) -> dict[str, Any]:
    result = pab("plan", "--model", model, *GIVEN, "--json")
    assert result.exit_code == 0 and result.stderr == "", result.output
    data: dict[str, Any] = json.loads(result.stdout)
    assert data.pop("model") == str(model)
    return data


def test_a_file_a_saved_transformer_and_a_saved_pipeline_give_the_same(transformer: Any, tmp_path: Path) -> None:
    transformer.save_pretrained(tmp_path / "saved")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    found = planned(tmp_path / "saved" / "config.json")
    assert found["calls_per_step"] == 2 and found["schedule"]["model"].count(".") > 0
    assert planned(tmp_path / "saved") == planned(tmp_path / "pipeline") == found


def test_a_transformer_of_ones_own_needs_size_and_steps(transformer: Any, tmp_path: Path) -> None:
    transformer.save_pretrained(tmp_path)
    for given, missing in ((("--steps", 4), "size"), (("--size", "5x32x48"), "steps")):
        result = pab("plan", "--model", tmp_path, *given)
        assert (result.exit_code, result.stderr) == (
            2,
            f"pab: {tmp_path} is not a known family, so {missing} must be given\n",
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"_class_name": "UNet2DModel"}', "{} is a UNet2DModel; supported are LatteTransformer3DModel, "),
        ('{"_class_name": "WanPipeline"}', "{} is a WanPipeline; supported are "),
        ('{"num_layers": 2}', "{} names no class"),
        ('{"_class_name": 3}', "{} names no class"),
        ("[]", "{} does not hold a config, but list"),
        ("{", "{} is not JSON: "),
        (
            '{"_class_name": "WanTransformer3DModel", "num_layers": "two"}',
            "{}: WanTransformer3DModel does not take this config: ",
        ),
    ],
)
def test_a_config_that_is_not_a_transformers_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    result = pab("plan", "--model", path, *GIVEN)
    assert result.exit_code == 2 and result.stderr.startswith("pab: " + message.format(path)), result.output
    assert result.stderr.count("\n") == 1


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    result = pab("plan", "--model", tmp_path, *GIVEN)
    assert (result.exit_code, result.stderr) == (
        2,
        f"pab: {tmp_path} has no config.json and no transformer/config.json\n",
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (errors.RepositoryNotFoundError, "the hub has no such repository, or it is private: `hf auth login`"),
        (errors.GatedRepoError, "its terms must be accepted on the hub first, then `hf auth login`"),
        (errors.EntryNotFoundError, "it has no transformer/config.json and no config.json"),
        (errors.HfHubHTTPError, "said so"),
        (errors.HfHubHTTPError.__bases__[0], "said so"),
        (ConnectionResetError, "said so"),
    ],
)
def test_what_the_hub_refuses_is_named(error: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*arguments: Any) -> str:
        asked.append(arguments)
        raised = error.__new__(error)  # without the answer that some want in __init__
        raised.args = ("said\nso",)
        raise raised

    monkeypatch.setattr(hub, "hf_hub_download", download)
    result = pab("plan", "--model", "nobody/nothing")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"pab: the config of nobody/nothing is not cached and cannot be fetched: {reason}; give the path of a "
    )
    assert len(asked) == (2 if error is errors.EntryNotFoundError else 1)


def test_an_error_that_is_not_the_hubs_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any) -> str:
        raise RuntimeError("a fault")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert isinstance(pab("plan", "--model", "nobody/nothing").exception, RuntimeError)


def test_a_hub_id_of_a_transformer_alone_is_fetched(
    transformer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer.save_pretrained(tmp_path)

    def download(hub_id: str, name: str) -> str:
        if name.startswith("transformer/"):
            raise errors.EntryNotFoundError.__new__(errors.EntryNotFoundError, name)
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert planned(Path("somebody/a-transformer")) == planned(tmp_path)
