"""The ranks that share a model, as a mesh of branches of guidance and parts of the sequence."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from types import NoneType
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

CFG, SEQUENCE = "cfg", "sequence"
"""Names of the dimensions of a mesh."""
BRANCHES = 2
"""Of classifier-free guidance, in one batch."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """A mesh of `cfg` times `sequence` ranks, as one of them sees it.

    Args:
        cfg: the group over which the batch is split; None if it is not.
        sequence: the group over which tokens are split; None if they are not.
        control: a group of all these ranks on the host, on which they agree; None in a simulation of ranks.
        made: those of them that were made here.
    """

    cfg: dist.ProcessGroup | None
    sequence: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    made: tuple[dist.ProcessGroup, ...] = ()

    def leave(self) -> None:
        """Destroy the groups that were made here."""
        for group in self.made:
            if dist.is_initialized():
                with contextlib.suppress(ValueError):  # it was destroyed with all others
                    dist.destroy_process_group(group)


def size_of(group: dist.ProcessGroup | None) -> int:
    """The number of ranks in a group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """The index of this rank in a group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def join(mesh: DeviceMesh | None, cfg: int, sequence: int | None, timeout: float) -> Ranks:
    """The groups of this rank. All ranks call it with the same arguments.

    Args:
        mesh: with dimensions named "cfg" and "sequence", or one of them; None to make the groups from all ranks.
        cfg: 1 or 2, of a new mesh.
        sequence: of a new mesh; default all ranks over `cfg`.
        timeout: seconds after which a rank that waits for the others raises, in groups that are made here.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the numbers do not fit.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialised; start the program with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if not isinstance(timeout, (int, float)) or not 0 < timeout < 1e6:
        raise ValueError(f"got timeout={timeout!r}; seconds above 0 are supported")
    for name, value in ((CFG, cfg), (SEQUENCE, sequence)):
        if isinstance(value, bool) or not isinstance(value, (int, NoneType)):
            raise TypeError(f"got {name}={value!r}; a number of ranks is supported")
    after = timedelta(seconds=timeout)
    if mesh is not None:
        if cfg != 1 or sequence is not None:
            raise ValueError(f"got a mesh with cfg={cfg} and sequence={sequence}; the mesh has both: leave them out")
        return _of_mesh(mesh, after)
    world = dist.get_world_size()
    if cfg not in (1, BRANCHES):
        raise ValueError(
            f"got cfg={cfg!r}; supported are 1, and {BRANCHES} for the two branches of guidance in one batch"
        )
    sequence = world // cfg if sequence is None else sequence
    if sequence < 1 or cfg * sequence != world:
        raise ValueError(
            f"got cfg={cfg} and sequence={sequence}, {cfg * sequence} ranks, but {world} are running; their product "
            "must be the number of ranks"
        )
    rows = [list(range(row * sequence, (row + 1) * sequence)) for row in range(cfg)]
    columns = [[row[i] for row in rows] for i in range(sequence)]

    def made(groups: list[list[int]], name: str) -> dist.ProcessGroup | None:
        own, _ = dist.new_subgroups_by_enumeration(groups, timeout=after, group_desc=f"pab {name}")
        return own

    in_cfg = made(columns, CFG) if cfg > 1 else None
    in_sequence = made(rows, SEQUENCE) if sequence > 1 else None
    control = _control(list(range(world)), after)
    return Ranks(in_cfg, in_sequence, control, tuple(group for group in (in_cfg, in_sequence, control) if group))


def _of_mesh(mesh: DeviceMesh, timeout: timedelta) -> Ranks:
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= {CFG, SEQUENCE}:
        raise ValueError(f"got a mesh with dimensions {names}; supported are {CFG!r} and {SEQUENCE!r}, each once")

    def group(name: str) -> dist.ProcessGroup | None:
        part: Any = mesh[name] if name in names else None
        return part.get_group() if part is not None and part.size() > 1 else None

    if size_of(group(CFG)) not in (1, BRANCHES):
        raise ValueError(f"got a mesh of {size_of(group(CFG))} ranks along {CFG!r}; 1 and {BRANCHES} are supported")
    control = _control(mesh.mesh.flatten().tolist(), timeout)
    return Ranks(group(CFG), group(SEQUENCE), control, () if control is None else (control,))


def _control(ranks: list[int], timeout: timedelta) -> dist.ProcessGroup | None:
    if dist.get_backend() == "fake":
        return None
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, ranks)  # other ranks may share another copy of the model
    copies = [list(copy) for copy in sorted(set(map(tuple, all_ranks)))]
    own: dist.ProcessGroup
    own, _ = dist.new_subgroups_by_enumeration(copies, timeout=timeout, backend="gloo", group_desc="pab control")
    dist.barrier(own)  # none leaves the groups, as after an error, while others still connect to it
    return own
