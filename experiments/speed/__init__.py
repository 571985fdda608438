"""How long things take, in seconds and bytes, beside other tools."""
