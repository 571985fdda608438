"""A function as a program, run again with rules of one's own."""
