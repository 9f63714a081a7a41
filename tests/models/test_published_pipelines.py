"""Published models by name: what is asked for, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pab_kernels import PABConfig
from pab_kernels.analysis.pipeline_call import Wish
from pab_kernels.generate import Settings
from pab_kernels.models.published_pipelines import PUBLISHED, load
from pab_kernels.rules.presets import presets


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open-sora-2", "there is no published model 'open-sora-2'; supported are open-sora-1.2, open-sora-plan-1.1"),
        ("open-sora-1.2/480p", "open-sora-1.2 has no variant '480p'; supported are open-sora-1.2$"),
        ("open-sora-plan-1.2/1080p", "has no variant '1080p'; supported are open-sora-plan-1.2/93x480p, "),
    ],
)
def test_an_unknown_name_is_an_error_with_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("open-sora-1.2", "hpcai-tech/OpenSora-STDiT-v3 on the hub"),
        ("open-sora-plan-1.1/221x512x512", "LanguageBind/Open-Sora-Plan-v1.1.0, folder 221x512x512 on the hub"),
        ("open-sora-plan-1.2", "LanguageBind/Open-Sora-Plan-v1.2.0, folder 93x480p on the hub"),
    ],
)
def test_a_missing_part_is_named_with_where_it_comes_from(name: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load(name, tmp_path, local_files_only=True)
    said = str(error.value)
    assert said.startswith(
        f"{name} lacks its transformer: no folder transformer in {tmp_path}; it is published as {where}"
    )
    assert said.endswith("fetch it, or give --weights FOLDER with a folder transformer") and "\n" not in said
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(name, tmp_path / "none")


def test_every_published_model_has_its_published_rules() -> None:
    assert PUBLISHED.keys() <= presets().keys()
    settings = Settings("open-sora-plan-1.2/29x720p", Wish("a red circle"), pab="published")
    assert settings.config(None) == PABConfig.preset("open-sora-plan-1.2")
    with pytest.raises(ValueError, match=r"are for models by name \(open-sora-1.2, .* got model 'demo'"):
        Settings("demo", Wish("a red circle"), pab="published")
