"""What nvcc makes of the CUDA kernels: no spills, what each kernel promises, and bounds that only fall."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from pab_kernels.ops import cuda_library
from tests.csrc.compilation import Promise, compiled, promises
from tests.kernels import bounds

pytest.importorskip("triton")

PROMISES = promises()


@pytest.fixture(scope="module")
def records():
    missing = cuda_library.build_info()["missing"]
    if missing is not None:
        pytest.skip(f"there are no compiled kernels: {missing}")
    return compiled()


def _promise(kernel: str) -> list[str]:
    return [pattern for pattern in PROMISES if fnmatchcase(kernel, pattern)]


def _faults(promise: Promise, record: dict) -> list[str]:
    opcodes = record["opcodes"]
    faults = ["spills"] * bool(record["stack"] or any(op.startswith(("LDL", "STL")) for op in opcodes))
    faults += [f"has no {start}" for start in promise.has if not any(op.startswith(start) for op in opcodes)]
    for start, wanted in promise.counts.items():
        found = sum(count for op, count in opcodes.items() if op.startswith(start))
        faults += [f"has {found} {start}, not {wanted}"] * (found != wanted)
    faults += [f"has {op}" for op in opcodes if op.startswith(promise.has_not or ("no such opcode",))]
    if promise.loads_first and record["loads"] != record["loads_before_stores"]:
        faults.append("loads after a store")
    if promise.waits and not record["waits"] and int(record["arch"].rstrip("af")) >= 90:
        faults.append("accesses memory before it waits")
    return faults


def test_every_kernel_keeps_its_promise(records):
    assert {r["kernel"]: _promise(r["kernel"]) for r in records if len(_promise(r["kernel"])) != 1} == {}, (
        "a kernel has one promise"
    )
    faults = {bounds.key(r): _faults(PROMISES[_promise(r["kernel"])[0]], r) for r in records}
    assert {kernel: found for kernel, found in faults.items() if found} == {}


def test_every_promise_is_of_a_kernel_that_there_is(records):
    assert [pattern for pattern in PROMISES if not any(fnmatchcase(r["kernel"], pattern) for r in records)] == []


def test_every_kernel_was_compiled_for_every_architecture(records):
    archs = cuda_library.build_info()["archs"]
    by_kernel = {r["kernel"]: sorted(o["arch"] for o in records if o["kernel"] == r["kernel"]) for r in records}
    assert {kernel: found for kernel, found in by_kernel.items() if found != sorted(archs)} == {}


def test_registers_and_shared_memory_keep_their_bounds(records):
    table, compiler = bounds.read(), records[0]["compiler"]
    if compiler not in table:
        pytest.skip(f"no bounds are kept for {compiler}")
    missing = [bounds.key(record) for record in records if bounds.key(record) not in table[compiler]]
    assert missing == [], "add them: python -m tests.csrc.compilation | python -m tests.kernels.bounds"
    assert bounds.tightened(table, records)[1] == []


def test_a_broken_promise_is_found():
    record = {"stack": 0, "opcodes": {"LDG.E.128": 2, "LDG.E.U16": 1, "STG.E": 1}, "loads": 3, "loads_before_stores": 2}
    assert _faults(Promise(), record) == []
    assert _faults(Promise(counts={"LDG.E": 3, "STG": 2, "HMMA": 0}), record) == ["has 1 STG, not 2"]
    promise = Promise(has=("LDG.E.128", "HMMA"), has_not=("LDG.E.U16",), loads_first=True)
    assert _faults(promise, record) == ["has no HMMA", "has LDG.E.U16", "loads after a store"]
    assert _faults(Promise(waits=True), record | {"arch": "90a", "waits": False}) == ["accesses memory before it waits"]
    assert _faults(Promise(waits=True), record | {"arch": "80", "waits": False}) == []
    assert (
        _faults(Promise(), record | {"stack": 8})
        == ["spills"]
        == _faults(Promise(), record | {"opcodes": {"STL.64": 1}})
    )
