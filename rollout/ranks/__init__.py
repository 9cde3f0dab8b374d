"""The ranks of torchrun: their device, their mesh, and whether all have the same."""
