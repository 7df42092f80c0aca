"""The user's own network, quantized layer by layer on its graph.

A network that robustq did not write is traced into a graph (:mod:`~robustq.models.own.tracing`), rewritten so that
every rectifier and pooling is a module of its own (:mod:`~robustq.models.own.standardise`), read (which values may be
negative, which layers come first and last: :mod:`~robustq.models.own.wiring`) and quantized with the same quantizers as
our networks (:mod:`~robustq.models.own.quantize`). Its parameters keep their names, so that float weights load.
"""
