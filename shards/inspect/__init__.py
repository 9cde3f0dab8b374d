"""What `rushes inspect` shows: tables of samples, queries on them, one sample in full."""
