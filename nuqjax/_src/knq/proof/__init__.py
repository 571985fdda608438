"""A proven lower bound on the squared error of any K levels."""
