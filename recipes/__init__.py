"""Recipes as TOML files, foldered by data set; this package only carries them into the wheel."""
