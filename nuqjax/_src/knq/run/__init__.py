"""Rows fitted on the host, traced, and on a mesh."""
