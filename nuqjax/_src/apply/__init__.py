"""The unchanged model on a compressed tree."""
