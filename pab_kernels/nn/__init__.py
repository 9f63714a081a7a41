"""Modules: attention under a plan, and `BroadcastModule`, which puts any attention module under one."""

from .attention import PABAttention
from .broadcast_module import BroadcastModule
from .cross_attention import PABCrossAttention
from .rotary import rotary_embedding

__all__ = ["BroadcastModule", "PABAttention", "PABCrossAttention", "rotary_embedding"]
