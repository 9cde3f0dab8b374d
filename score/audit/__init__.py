"""From a number back to what it was made of."""
