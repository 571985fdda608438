"""The best partition of sorted rows."""
