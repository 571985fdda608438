"""Other files in and out, streamed and resumed."""
