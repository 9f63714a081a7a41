"""Modules: `BroadcastModule` wraps any attention module."""

from .broadcast_module import BroadcastModule

__all__ = ["BroadcastModule"]
