"""The embedded model `words`: its weights, its prompts, and how both were made."""
