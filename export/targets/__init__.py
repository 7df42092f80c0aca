"""Targets: what a device or a tool takes, one TOML file each; :mod:`.schema` reads them, :mod:`.check` checks files."""
