"""Modules under PAB: attention for models of your own, and `BroadcastModule`, which wraps any module."""

from .attention import PABAttention
from .broadcast_module import BroadcastModule
from .cross_attention import PABCrossAttention
from .rotary import rotary_embedding

__all__ = ["BroadcastModule", "PABAttention", "PABCrossAttention", "rotary_embedding"]
