"""Keeps how the parts of `bench/gpu.sh` ended: lines `part<TAB>status<TAB>seconds<TAB>what` from the standard input, as
JSON lines."""

from __future__ import annotations

import sys

from .record import append, environment


def main() -> None:
    """Append a row for every line to the file named."""
    shared = environment()
    for line in sys.stdin:
        part, status, seconds, what = line.rstrip("\n").split("\t", 3)
        append(
            sys.argv[1], {"bench": "gpu", "part": part, "status": status, "seconds": int(seconds), "what": what}, shared
        )


if __name__ == "__main__":
    main()
