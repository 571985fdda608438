"""Sorted rows."""
