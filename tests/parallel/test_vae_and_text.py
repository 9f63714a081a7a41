"""What a parallel pipeline does around its model's calls: text on one rank, one noise on all, the VAE over ranks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
import torch.distributed as dist

import pab_kernels as pab
from tests.parallel.decoding import open_sora
from tests.parallel.processes import run_on
from tests.tiny_pipelines import latte

CLIP = {"num_frames": 20, "height": 16, "width": 24, "num_inference_steps": 2, "output_type": "pt"}
GROUPS = 5 + 1
"""Calls of the 2-D network for 20 frames: five for a chunk of 17, one for the three that remain."""


def sample(pipe: Any, seed: int | None = 0, **options: Any) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return pipe("a red circle", clean_prompt=False, generator=generator, **CLIP | options).frames


def counted(module: Any) -> list[int]:
    """A list that grows with every call of a module, by the length of its first argument."""
    calls: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        calls.append(len(next(iter([*args, *kwargs.values()]))))

    module.register_forward_pre_hook(count, with_kwargs=True)
    return calls


def failure(run: Any) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail(*_: Any) -> None:
    raise ValueError("no space")


def open_sora_on(rank: int) -> dict[str, Any]:
    pipe = open_sora()
    texts, frames = counted(pipe.text_encoder), counted(pipe.vae.spatial_vae.module.decoder)
    alone = sample(pipe)
    before = {name: sorted(vars(part)) for name, part in (("pipe", pipe), ("vae", pipe.vae))}
    texts.clear(), frames.clear()
    pab.parallelize(pipe)
    found: dict[str, Any] = {"alone": alone, "together": sample(pipe), "texts": [*texts], "frames": [*frames]}
    found["other seed"] = sample(pipe, seed=rank)
    torch.manual_seed(5 + rank)
    found["no generator"] = sample(pipe, seed=None)
    torch.manual_seed(5 + rank)
    picture = torch.full((1, 1, 3, 16, 24), 0.5, dtype=torch.float64)
    found["given frames"] = sample(pipe, seed=None, frames=picture, frame_mask=[1.0, 0.5, *[1.0] * 4])
    hooks = [pipe.text_encoder.register_forward_pre_hook(fail)]
    found["text fails"] = failure(lambda: sample(pipe))
    hooks.pop().remove()
    if rank == 1:
        hooks.append(pipe.vae.temporal_vae.register_forward_pre_hook(fail))
        hooks.append(pipe.vae.spatial_vae.module.decoder.register_forward_pre_hook(fail))
    found["vae fails"] = failure(lambda: sample(pipe))
    for hook in hooks:
        hook.remove()
    found["again"] = sample(pipe)
    with_generators = [torch.Generator()] * (1 + rank)
    found["generators"] = failure(lambda: pipe.prepare_latents((1, 4, 6, 2, 3), with_generators, torch.device("cpu")))
    pab.unparallelize(pipe)
    assert {name: sorted(vars(part)) for name, part in (("pipe", pipe), ("vae", pipe.vae))} == before
    found["undone"] = sample(pipe)
    pab.parallelize(pipe)
    pab.unparallelize(pipe.transformer)
    texts.clear()
    found["model alone"] = sample(pipe)
    found["texts of the model alone"] = [*texts]
    return found | latte_on(rank)


def latte_on(rank: int) -> dict[str, Any]:
    torch.manual_seed(1)
    pipe = latte().to(torch.float64)
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", "video_length": 4}
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return pipe("a red circle", clean_caption=False, **options).frames

    frames = counted(pipe.vae.decoder)
    whole = run()
    pipe.vae.enable_slicing()
    three = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = {"latte alone": run(), "three alone": pipe.vae.decode(three).sample}
    frames.clear()
    pab.parallelize(pipe)
    found |= {"latte": run(), "latte frames": [*frames]}
    found["three"], found["one"] = pipe.vae.decode(three, return_dict=False)[0], pipe.vae.decode(three[:1]).sample
    pipe.vae.disable_slicing()
    frames.clear()
    found |= {"latte whole": run(), "latte whole alone": whole, "latte frames whole": [*frames]}
    pab.unparallelize(pipe)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on(2, open_sora_on)


def test_a_clip_has_the_same_bits_as_on_one_process(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["alone"].shape == (1, 20, 3, 16, 24) and found["alone"].std() > 0
        for name in ("together", "other seed", "again", "undone", "model alone"):
            assert torch.equal(found[name], found["alone"]), name


def test_text_is_encoded_on_the_first_rank_alone(ranks: list[dict[str, Any]]) -> None:
    assert [found["texts"] for found in ranks] == [[1], []]
    assert [found["texts of the model alone"] for found in ranks] == [[1], [1]]


def test_each_rank_decodes_its_share_of_the_groups_of_frames(ranks: list[dict[str, Any]]) -> None:
    assert [found["frames"] for found in ranks] == [[4, 4, 4], [4, 1, 3]]
    assert sum(len(found["frames"]) for found in ranks) == GROUPS


def test_noise_is_the_first_ranks_without_a_generator_and_with_given_frames(ranks: list[dict[str, Any]]) -> None:
    for name in ("no generator", "given frames"):
        first, second = (found[name] for found in ranks)
        assert torch.equal(first, second) and not torch.equal(first, ranks[0]["alone"]), name


def test_what_one_rank_fails_at_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    assert [found["text fails"] for found in ranks] == [
        "ValueError: no space",
        "RanksDiffer: rank 0 failed in encode_prompt: ValueError: no space",
    ]
    assert [found["vae fails"] for found in ranks] == [
        "RanksDiffer: rank 1 failed in decoding: ValueError: no space",
        "ValueError: no space",
    ]
    (error,) = {found["generators"] for found in ranks}
    assert error == "RanksDiffer: got 1, 2 generators on the ranks; give all ranks as many, or none"


def test_frames_of_latte_are_decoded_over_the_ranks_with_slicing_alone(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert torch.equal(found["latte"], found["latte alone"])
        assert torch.equal(found["latte whole"], found["latte whole alone"])
        assert found["latte frames"] == [1, 1] and found["latte frames whole"] == [4]
        assert torch.equal(found["three"], found["three alone"]) and torch.equal(found["one"], found["three"][:1])
