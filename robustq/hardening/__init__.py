"""Training: the loop, its state, metrics, monitor and run folder; methods in :mod:`robustq.hardening.methods`."""
