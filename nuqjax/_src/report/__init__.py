"""Sizes, errors and certificates, as tables and pictures."""
