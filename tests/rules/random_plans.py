"""Any plan of a small model: up to three layers of all kinds, some in blocks that have a rule, some entered in the
middle."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from pab_kernels.rules.config import MODULE_KINDS, Broadcast, PABConfig
from pab_kernels.rules.plan import Plan, Sublayer
from pab_kernels.rules.schedule import Schedule


@st.composite
def _broadcasts(draw: st.DrawFn, num_steps: int) -> Broadcast:
    reach, layers = draw(st.integers(1, 6)), draw(st.none() | st.sets(st.integers(0, 3), min_size=1))
    reuse = draw(st.sampled_from(["hold", "linear"]))
    unit = draw(st.sampled_from(["fraction", "step", "timestep"]))
    if unit != "fraction" and draw(st.booleans()):
        points = draw(st.sets(st.integers(0, num_steps + 2), min_size=1, max_size=4))
        return Broadcast(reach, unit=unit, reuse=reuse, layers=layers, at=points)
    if unit == "fraction" and draw(st.booleans()):
        return Broadcast(reach, reuse=reuse, layers=layers)
    lo, hi = sorted(draw(st.lists(st.integers(0, num_steps + 2), min_size=2, max_size=2, unique=True)))
    window = (lo / (num_steps + 2), hi / (num_steps + 2)) if unit == "fraction" else (lo, hi)
    return Broadcast(reach, window, unit, reuse, layers)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_steps = draw(st.integers(1, 20))
    rule = st.none() | _broadcasts(num_steps)
    rules = draw(st.lists(st.tuples(st.sampled_from(MODULE_KINDS), _broadcasts(num_steps)), max_size=3))
    model = draw(rule.map(lambda rule: rule and replace(rule, layers=None)))
    config = PABConfig(**{kind: draw(rule) for kind in MODULE_KINDS}, model=model, rules=rules)
    timesteps = tuple(i + 0.5 for i in reversed(range(num_steps)))
    schedule = Schedule(num_steps, timesteps, draw(st.integers(0, num_steps - 1)))
    sublayers = []
    for layer in range(draw(st.integers(1, 3))):
        block = f"blocks.{layer}" if draw(st.booleans()) else None
        sublayers += [Sublayer(f"blocks.{layer}.{kind}", kind, layer, block=block) for kind in MODULE_KINDS[:-1]]
        if block:
            sublayers.append(Sublayer(block, "block", layer))
    return Plan(config, schedule, tuple(draw(st.permutations(sublayers))))
