"""Presets: what `rushes init --preset NAME` begins from, one TOML file each."""
