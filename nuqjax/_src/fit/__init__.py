"""The methods that fit levels to rows, and the table of them."""
