"""The lockstep machine itself: products, shuffles and conversions are right, and what is wrong ends a launch with a
sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.csrc.lockstep import compiled


def test_the_machine_computes_and_finds_faults(tmp_path: Path) -> None:
    done = subprocess.run([compiled("tests/test_lockstep.cu", tmp_path, shared=False)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
