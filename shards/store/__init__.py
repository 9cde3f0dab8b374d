"""Runs in an object store: objects, the working copy of them on this machine, and what goes wrong."""
