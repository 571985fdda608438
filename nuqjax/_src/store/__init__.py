"""Saves trees to files and loads them."""
