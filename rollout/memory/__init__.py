"""How much memory each stage needs, from configuration files alone."""
