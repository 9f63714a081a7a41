"""Benchmarks: every speed claim of this project comes from a file in `bench/results/` that one of these wrote."""
