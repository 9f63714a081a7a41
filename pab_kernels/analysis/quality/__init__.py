"""Comparing two clips: `compare`."""
