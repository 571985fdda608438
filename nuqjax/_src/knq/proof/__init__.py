"""A bound below which no levels can come."""
