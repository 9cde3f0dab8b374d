"""Files of a run: shards, their index and manifest, the tables beside them, and all that reads or writes them."""
