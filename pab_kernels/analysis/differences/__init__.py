"""How much the outputs of sublayers differ from step to step: `analyze`."""
