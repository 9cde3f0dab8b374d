"""What this machine has of all that rushes needs."""
