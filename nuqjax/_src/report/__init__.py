"""Reports sizes, errors and certificates as tables and pictures."""
