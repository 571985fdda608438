"""Readers of checkpoints, one file for each format."""
