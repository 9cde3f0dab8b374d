"""A run in a notebook: what `shards.open` gives."""
