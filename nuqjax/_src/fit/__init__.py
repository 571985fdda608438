"""The table of methods: rows to levels."""
