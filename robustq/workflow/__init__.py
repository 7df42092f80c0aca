"""Whole jobs made of the rooms below: train, harden, attack, export, re-check, quickstart. Each returns what its --json
prints.
"""
