"""Texts of prompts: cleaned once, quoted targets, and the characters that a recogniser can read."""
