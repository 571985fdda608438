"""Experiments on trained networks and real images; they use only the public names of nuqjax."""
