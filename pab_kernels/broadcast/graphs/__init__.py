"""CUDA graphs of a model: captured, replayed, and shared by the generations that follow one another."""
