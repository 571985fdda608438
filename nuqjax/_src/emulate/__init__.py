"""Runs a model on raw integers, and chooses its formats."""
