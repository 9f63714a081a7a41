"""A pipeline whose VAE several ranks share, and what eight of them decode."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

import pab_kernels as pab
from pab_kernels.models.open_sora.pipeline import OpenSoraPipeline
from pab_kernels.models.open_sora.vae import OpenSoraVAE
from tests.models.tiny_open_sora import TEXT, one_layer
from tests.tiny_pipelines import latte, text_encoder, tokenizer


def open_sora() -> Any:
    """Open-Sora with a VAE of its class, in float64."""
    torch.manual_seed(0)
    vae = OpenSoraVAE((8, 8, 8, 8), 1, (8, 8, 8, 8), 1, norm_num_groups=4)
    pipe = OpenSoraPipeline(one_layer(), vae=vae, text_encoder=text_encoder(TEXT), tokenizer=tokenizer())
    pipe.to(torch.float64).set_progress_bar_config(disable=True)
    return pipe


def decoded(rank: int) -> list[bool]:
    """Whether clips have the same bits as on one process: on each half of eight ranks, by a mesh of the caller with two
    ranks for guidance and two for the sequence, and on all eight."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("copies", "cfg", "sequence"))["cfg", "sequence"]
    video, frames = open_sora(), latte()
    frames.vae.enable_slicing()
    noise = torch.randn(5, 4, 6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    calls = (
        lambda: video.vae.decode(noise[:2], num_frames=20).sample,
        lambda: video.vae.decode(noise[:1, :, :1], num_frames=1).sample,  # for one rank of them
        lambda: frames.vae.decode(noise[:, :, 0].float()).sample,
    )
    expected = [call() for call in calls]
    found = []
    for options in ({"mesh": mesh}, {"cfg": 2}):
        for pipe, own in ((video, calls[:2]), (frames, calls[2:])):
            pab.parallelize(pipe, **options)
            found += [call() for call in own]
            pab.unparallelize(pipe)
    return [torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True)]
