"""The model on raw integers, and its formats."""
