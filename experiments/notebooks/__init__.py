"""Lessons with pictures, as notebooks with their outputs; `python -m experiments.notebooks` makes the outputs anew."""
