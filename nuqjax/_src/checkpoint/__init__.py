"""Reads and writes checkpoints of other formats, and compresses them leaf by leaf, with resuming."""
