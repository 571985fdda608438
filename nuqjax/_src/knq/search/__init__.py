"""The search for the best partition of sorted rows into K intervals."""
