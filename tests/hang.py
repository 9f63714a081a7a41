"""How long a test waits for another thread or process before it takes it for hung."""

HANG = 3600.0
"""Seconds.

Nothing here waits for more than a few, and on a machine that is ten times slower, or shared with others, for a few
minutes.
"""
