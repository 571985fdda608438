"""What compression, data and integers do to trained networks."""
