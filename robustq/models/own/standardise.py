"""All rewrites that a traced graph goes through before it is read and quantized, in the order that they need."""

from __future__ import annotations

from brevitas.backport.fx import GraphModule

from robustq.models.own.passes.clamps_to_rectifiers import clamps_to_rectifiers
from robustq.models.own.passes.fixed_reshapes import fixed_reshapes
from robustq.models.own.passes.functions_to_modules import functions_to_modules
from robustq.models.own.passes.means_to_pooling import means_to_pooling
from robustq.models.own.passes.one_module_a_call import one_module_a_call
from robustq.models.own.passes.out_of_place import out_of_place
from robustq.models.own.passes.pooling_windows import pooling_windows
from robustq.models.own.passes.rectifiers_first import rectifiers_first
from robustq.models.own.values import probe


def standardise(graph: GraphModule, *, channels: int, image_size: int, name: str) -> None:
    """Rewrite ``graph`` in place; every answer stays, bit for bit, and every node knows its shape afterwards.

    Args:
        graph: from :func:`robustq.models.own.tracing.trace`.
        channels, image_size: of the images.
        name: what messages call the network.

    Raises:
        UsageError: an operation that cannot be rewritten, or does not take images of this shape; it is named.
    """
    out_of_place(graph)
    clamps_to_rectifiers(graph)
    functions_to_modules(graph)
    one_module_a_call(graph)
    probe(graph, channels=channels, image_size=image_size, name=name)
    means_to_pooling(graph)
    pooling_windows(graph)
    fixed_reshapes(graph)
    rectifiers_first(graph)
    probe(graph, channels=channels, image_size=image_size, name=name)
