"""Data sets: each set's own published format, decoded once into memory-mapped arrays (see `.cache`)."""
