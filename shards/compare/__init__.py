"""Runs side by side: settings that differ, curves, and what each prompt gained."""
