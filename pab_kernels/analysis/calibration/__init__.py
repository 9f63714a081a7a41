"""Choosing the steps at which a model runs by measuring full runs: `calibrate`."""
