"""The table of registers and shared memory of every compiled kernel: bounds that may only fall.

`python -m tests.kernels.compilation 80 90 100 | python -m tests.kernels.bounds` (Triton) or
`python -m tests.csrc.compilation | python -m tests.kernels.bounds` (CUDA) adds launches that are new and lowers bounds
where kernels have become leaner; where one has become fatter it ends with an error and writes nothing. `--drop` takes
out the launches that are gone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("bounds.json")


def read() -> dict[str, dict[str, list[int]]]:
    """By compiler (a Triton version, or nvcc and its version) and `<launch> <kernel> sm_<arch>`: registers and bytes of
    shared memory."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def key(record: dict[str, Any]) -> str:
    """The row of a record."""
    return f"{record['launch']} {record['kernel']} sm_{record['arch']}"


def tightened(
    table: dict[str, dict[str, list[int]]], records: Iterable[dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The table with lower bounds, and a sentence for each bound that would have to rise."""
    broken = []
    tightened = {version: dict(rows) for version, rows in table.items()}
    for record in records:
        row, used = tightened.setdefault(record["compiler"], {}), [record["registers"], record["shared"]]
        bound = row.get(key(record), used)
        broken += (
            [f"{key(record)}, {record['compiler']}: {used}, bound {bound}"] if any(map(int.__gt__, used, bound)) else []
        )
        row[key(record)] = list(map(min, used, bound))
    return tightened, broken


def main() -> None:
    """Read records from the standard input and write the table."""
    table = read()
    records = [json.loads(line) for line in sys.stdin]
    new, broken = tightened(table, records)
    if broken:
        raise SystemExit("\n".join(["registers or shared memory would rise:", *broken]))
    if "--drop" in sys.argv:
        seen = {(record["compiler"], key(record)) for record in records}
        new = {
            version: {k: v for k, v in rows.items() if (version, k) in seen or all(version != s for s, _ in seen)}
            for version, rows in new.items()
        }
    lines = [
        f'"{version}": {{\n' + ",\n".join(f" {json.dumps(k)}: {v}" for k, v in sorted(rows.items())) + "\n}"
        for version, rows in sorted(new.items())
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
