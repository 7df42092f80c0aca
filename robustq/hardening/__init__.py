"""Training: the one loop and what it keeps, watches and writes; the methods are in :mod:`robustq.hardening.methods`."""
