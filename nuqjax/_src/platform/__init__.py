"""Differences between releases of JAX, work on the host, and meshes."""
