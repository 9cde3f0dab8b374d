"""Who does what: claims on shards, their owners, and what `rushes status` says of them."""
