"""Custom networks (torch modules that robustq did not write), quantized layer by layer on their torch.fx graph.

A network is traced (:mod:`~robustq.models.fx.trace`), rewritten into a standard form in which every ReLU and pooling is
a module (:mod:`~robustq.models.fx.passes`, :mod:`~robustq.models.fx.shapes`), analysed and quantized with the same
quantizers as our networks (:mod:`~robustq.models.fx.quantize`). The parameters keep their names, so that float weights
load.
"""
