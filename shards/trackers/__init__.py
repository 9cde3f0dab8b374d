"""Metrics for the programs that people watch their runs with."""
