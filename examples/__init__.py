"""Lessons with pictures, as notebooks with their outputs; `python -m examples` makes the outputs anew."""
