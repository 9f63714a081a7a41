"""What the compiler makes of the Triton kernels: no spills, wide accesses, tensor cores, and bounds that only fall."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import bounds
from tests.kernels.compilation import Launch, launches

pytest.importorskip("triton")

ARCHS = (80, 90, 100)
OLDEST = Path(sys.prefix) / "triton-3.6.0"
"""The oldest Triton that is supported; `make test` puts it there."""

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory that a block may have."""

LAUNCHES = launches()
WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _compiled(version: str) -> dict[tuple[str, int], list[dict]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version == "oldest":
        if not OLDEST.is_dir():
            pytest.skip(f"Triton 3.6.0 is not at {OLDEST}: `make test` installs it there")
        env["PYTHONPATH"] = str(OLDEST)
    cache = os.environ.get("TRITON_CACHE_DIR", Path(sys.prefix) / "triton-cache")
    env["TRITON_CACHE_DIR"] = f"{cache}-{version}"  # kernels that did not change are not compiled again
    command = [sys.executable, "-m", "tests.kernels.compilation", *map(str, ARCHS)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[tuple[str, int], list[dict]] = {}
    for record in map(json.loads, done.stdout.splitlines()):
        found.setdefault((record["launch"], record["arch"]), []).append(record)
    return found


@pytest.fixture(scope="module", params=["newest", "oldest"])
def compiled(request):
    return _compiled(request.param)


def _widths(opcodes: dict[str, int], instructions: tuple[str, ...]) -> set[int]:
    accesses = [op.split(".") for op in opcodes if op.startswith(instructions)]
    return {next((WIDTH[part] for part in parts if part in WIDTH), 4) for parts in accesses}


def _faults(launch: Launch, record: dict) -> list[str]:
    opcodes, arch = record["opcodes"], record["arch"]
    names = {op.partition(".")[0] for op in opcodes}
    tensor_cores = {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA", "HMMA"}}[arch]
    checks = {
        "spills": record["stack"] == 0 and not names & {"LDL", "STL"},
        "has more shared memory than a block may": record["shared"] <= SHARED_LIMIT[arch],
        "has no product on tensor cores": not launch.dots or names & tensor_cores,
        "has products by multiply-adds": not (launch.dots and record["plain_dots"]),
        "has products on the old tensor core path": not (launch.dots and arch == 90) or "HMMA" not in names,
        "has no asynchronous copy": not launch.pipelined or names & {"LDGSTS", "UTMALDG"},
        "has narrow accesses": launch.wide is None
        or min(_widths(opcodes, ("LDG.", "STG.", "LDGSTS")), default=16) >= launch.wide,
    }
    return [fault for fault, fine in checks.items() if not fine]


def test_every_kernel_is_lean(compiled):
    faults = {bounds.key(r): _faults(LAUNCHES[name], r) for (name, _), records in compiled.items() for r in records}
    assert {kernel: found for kernel, found in faults.items() if found} == {}


def test_products_by_multiply_adds_are_seen(compiled):
    """Those of float32 are exact, and so not on tensor cores: what the check of all other launches looks for."""
    plain = [
        record["plain_dots"]
        for (name, _), records in compiled.items()
        for record in records
        if name.startswith("project_residual/float32")
    ]
    assert plain and min(plain) > 0


def test_every_launch_was_compiled_for_its_architectures(compiled):
    assert set(compiled) == {
        (name, arch) for name, launch in LAUNCHES.items() for arch in ARCHS if arch in launch.archs
    }


def test_registers_and_shared_memory_keep_their_bounds(compiled):
    records = [record for records in compiled.values() for record in records]
    table = bounds.read()
    version = records[0]["compiler"]
    if version not in table:
        pytest.skip(f"no bounds are kept for Triton {version}")
    missing = [bounds.key(record) for record in records if bounds.key(record) not in table[version]]
    assert missing == [], "add them: python -m tests.kernels.compilation 80 90 100 | python -m tests.kernels.bounds"
    assert bounds.tightened(table, records)[1] == []


def test_a_bound_falls_and_never_rises():
    record = {"launch": "a", "kernel": "k", "arch": 90, "compiler": "3", "registers": 64, "shared": 1024}
    table, broken = bounds.tightened({}, [record])
    assert table == {"3": {"a k sm_90": [64, 1024]}} and not broken
    assert bounds.tightened(table, [record | {"registers": 60}]) == ({"3": {"a k sm_90": [60, 1024]}}, [])
    assert bounds.tightened(table, [record | {"shared": 1025}])[1] == ["a k sm_90, 3: [64, 1025], bound [64, 1024]"]
