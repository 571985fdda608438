"""Runs an unchanged model on a compressed tree."""
