"""How close two clips are: `compare`."""
