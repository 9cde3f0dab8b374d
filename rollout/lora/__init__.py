"""LoRA: adapters that are trained, foreign ones to begin with, and those merged into the base model."""
