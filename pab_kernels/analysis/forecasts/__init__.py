"""What PAB will do to a model, from shapes alone: `forecast`."""
