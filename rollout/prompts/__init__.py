"""Prompts: files of every format, their fields, and what a model and its rewards ask of them."""
