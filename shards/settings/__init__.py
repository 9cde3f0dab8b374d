"""Settings as stages keep them, and how they differ between iterations and runs."""
