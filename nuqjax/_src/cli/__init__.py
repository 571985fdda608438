"""The command line: its options, and a function for each command."""
