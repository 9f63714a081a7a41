"""CUDA graphs of a model: captured, replayed, and shared by successive generations."""
