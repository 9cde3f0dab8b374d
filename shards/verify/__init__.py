"""What `rushes verify` checks: shards and their tables, and what training leaves."""
