"""Custom models (torch modules that robustq did not write), quantized on their torch.fx graph.

:mod:`~robustq.models.fx.build` does all of it: :mod:`~robustq.models.fx.trace` makes the graph of the float model,
:mod:`~robustq.models.fx.passes` and :mod:`~robustq.models.fx.shapes` rewrite it, :mod:`~robustq.models.fx.ops` gives
the kinds of its nodes, :mod:`~robustq.models.fx.quantize` places the quantizers. Parameters keep their names, so that
float weights load. :mod:`~robustq.models.fx.fold` folds BatchNorm for the export.
"""
