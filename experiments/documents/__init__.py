"""The tables and pictures of the documents, from the results."""
