"""One-dimensional k-means, proven: rows < search < proof < run."""
