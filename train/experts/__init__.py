"""The experts of one iteration: one after another, or a process each."""
