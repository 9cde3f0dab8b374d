"""The report of a run: one HTML page, and the same curves for trackers."""
