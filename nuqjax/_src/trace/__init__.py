"""Traces a function to a program, and evaluates the program with rules given by the caller."""
