"""What releases of JAX, hosts and meshes ask for."""
