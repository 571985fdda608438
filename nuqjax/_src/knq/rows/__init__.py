"""Sorted rows with exact running sums: what the search and the proof read."""
