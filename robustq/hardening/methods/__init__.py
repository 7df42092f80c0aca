"""Training methods: one file each, chosen by name in :mod:`robustq.hardening.methods.registry`."""
