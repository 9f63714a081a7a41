"""Limits that kernels have and plans count with: host numbers, without torch."""

MOST_ADDED = 3
"""Additions to the residual stream that one operation takes; a projection counts as one of them."""
