"""Folds batch-norms into the layers before them."""
