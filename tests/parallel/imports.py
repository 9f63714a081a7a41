"""What ranks import, once, in the process from which they are forked."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has looked for GPUs cannot be forked

import importlib

for name in (
    "pab_kernels.demo_ranks",
    "tests.models.tiny_checkpoints",
    "tests.parallel.decoding",
    "tests.parallel.lives",
    "tests.parallel.token_runs",
):
    importlib.import_module(name)
