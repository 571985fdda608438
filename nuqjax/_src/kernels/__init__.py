"""Products with matrices that are stored as levels and packed indices, on plain arrays."""
