"""The trained policy as plain diffusers loads it, with a model card."""
