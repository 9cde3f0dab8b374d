"""Which kernels compute a forward: attention backends, and what torch.compile makes of the blocks."""
