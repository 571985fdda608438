"""Compression with data: moments of what each parameter multiplies, and levels, scales and indices fitted to them."""
