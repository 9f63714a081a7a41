"""One clip on two ranks, which share its frames and send nothing where PAB reuses an attention.

    torchrun --nproc-per-node 2 examples/two_ranks.py

It uses the demo model, on GPUs with NCCL or on the CPU with gloo, and takes some seconds. A number after the name of
the file is that of the sampling steps.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import pab_kernels as pab
from pab_kernels.analysis import video
from pab_kernels.analysis.pipelines import load_pipeline

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20

device = "cpu"
if torch.cuda.is_available():
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
dist.init_process_group("gloo" if device == "cpu" else "nccl")

pipe = load_pipeline("demo", device=device)
pipe.set_progress_bar_config(disable=True)
pab.enable(pipe, pab.PABConfig.preset("pab246"))
pab.parallelize(pipe)  # all ranks share the sequence; cfg=2 gives each half of them a branch of guidance instead

found = pipe(  # on all ranks alike; the text is encoded on the first, and the clip comes out on all
    "a red circle moves right at night",
    negative_prompt="",
    num_inference_steps=STEPS,
    guidance_scale=3.0,
    video_length=8,
    height=32,
    width=32,
    output_type="pt",
)
summary = pab.summary(pipe)
if dist.get_rank() == 0:
    print(summary)
    print(video.write_gif(Path("two_ranks.gif"), video.pixels(found.frames[0])))
dist.destroy_process_group()
