"""This process: its rank, its signals, its helpers, its progress, its memory and its versions."""
