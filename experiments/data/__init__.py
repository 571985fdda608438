"""Labelled images from where they are, as pixels in batches."""
