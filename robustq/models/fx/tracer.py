"""The tracer of custom models: sizes are numbers while tracing, so that branches and loops over them can be followed.

Each value is computed along as a fake tensor, which has a shape and no data. Its batch axis alone stays symbolic.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Interpreter, Node, Proxy, Tracer
from brevitas.backport.fx.node import map_arg
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)

FAKE_BATCH = 1009
"""Batch size of fake tensors: a prime, so that an axis whose size is a multiple of it holds the images."""


class SizedProxy(Proxy):  # type: ignore[misc]
    """A value in the graph whose sizes are numbers, except along the axis of the images."""

    tracer: SizedTracer
    node: Node

    @property
    def shape(self) -> Any:
        """A number or a symbolic value for each axis."""
        value = self.tracer.values.get(self.node)
        if not isinstance(value, Tensor):
            return self.__getattr__("shape")
        symbolic = self.__getattr__("shape")
        sizes = tuple(size if size % FAKE_BATCH else symbolic[axis] for axis, size in enumerate(value.shape))
        return torch.Size(sizes) if all(isinstance(size, int) for size in sizes) else sizes

    def size(self, dim: int | None = None) -> Any:
        """As :attr:`shape`, or of one axis."""
        value = self.tracer.values.get(self.node)
        if not isinstance(value, Tensor):
            return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> Any:
        """The number of axes."""
        value = self.tracer.values.get(self.node)
        return value.dim() if isinstance(value, Tensor) else self.tracer.create_proxy("call_method", "dim", (self,), {})

    @property
    def device(self) -> Any:
        """Of the fake tensor."""
        value = self.tracer.values.get(self.node)
        return value.device if isinstance(value, Tensor) else self.__getattr__("device")

    @property
    def dtype(self) -> Any:
        """Of the fake tensor."""
        value = self.tracer.values.get(self.node)
        return value.dtype if isinstance(value, Tensor) else self.__getattr__("dtype")

    def new_zeros(self, *size: Any, **options: Any) -> Any:
        """A constant where its sizes are numbers; an attention mask is filled part by part."""
        return self._new("zeros", *size, **options)

    def new_ones(self, *size: Any, **options: Any) -> Any:
        """A constant where its sizes are numbers."""
        return self._new("ones", *size, **options)

    def _new(self, name: str, *size: Any, **options: Any) -> Any:
        sizes = size[0] if len(size) == 1 and isinstance(size[0], list | tuple) else size
        if options or not all(isinstance(one, int) for one in sizes) or not isinstance(self.dtype, torch.dtype):
            return self.tracer.create_proxy("call_method", f"new_{name}", (self, *size), options)
        return getattr(torch, name)(tuple(sizes), dtype=self.dtype)

    @property
    def ndim(self) -> Any:
        """The number of axes."""
        return self.dim()


class SizedTracer(Tracer):  # type: ignore[misc]
    """See the module. ``images`` is the shape (C, H, W) of one image; None leaves all sizes symbolic."""

    record_stack_traces = True

    def __init__(self, images: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.images = images
        self.values: dict[Node, Any] = {}
        self._mode = None if images is None else FakeTensorMode(allow_non_fake_inputs=True)
        self._computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module becomes one node."""
        layer = next((layer for layer in LAYERS if isinstance(m, layer)), None)
        if layer is not None:  # a subclass of a layer is a leaf with the layer's own forward
            names = ("forward", "_conv_forward")
            return all(getattr(type(m), name, None) is getattr(layer, name, None) for name in names)
        return is_normalise(m) or bool(super().is_leaf_module(m, module_qualified_name))

    def proxy(self, node: Node) -> Proxy:
        """A proxy of a new node, whose value is computed along."""
        if self._mode is None:
            return super().proxy(node)
        self._computing = True
        try:
            with torch.no_grad(), self._mode:
                self.values[node] = self._compute(node)
        except Exception:  # the real run says in words what fails
            self.values[node] = None
        finally:
            self._computing = False
        return SizedProxy(node, self)

    def _compute(self, node: Node) -> Any:
        if node.op == "placeholder":
            return torch.empty(FAKE_BATCH, *(self.images or ()))
        args, kwargs = map_arg(node.args, self._value), map_arg(node.kwargs, self._value)
        if node.op == "get_attr":
            found: Any = operator.attrgetter(str(node.target))(self.root)
            return self._mode.from_tensor(found) if isinstance(found, Tensor) else found  # type: ignore[union-attr]
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return args[0] if isinstance(module, _BatchNorm) else module(*args, **kwargs)
        if node.target is functional.batch_norm:
            return args[0]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs) if node.op == "call_function" else None

    def _value(self, node: Node) -> Any:
        if node not in self.values:  # a tensor of the network, which got a node and no proxy
            self.values[node] = self._compute(node)
        return self.values[node]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As of the base class; a module that is computed is not traced."""
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """As of the base class; a module that is computed sees its own tensors."""
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)


def is_normalise(module: nn.Module) -> bool:
    """Whether ``module`` is one of torchvision's Normalize transforms, whose forward cannot be traced."""
    kind = type(module)
    return kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision.transforms")


class _FakeRun(Interpreter):  # type: ignore[misc]
    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Fake tensors take long for BatchNorm, which keeps the shape.
        is_norm = isinstance(self.module.get_submodule(target), _BatchNorm)
        return args[0] if is_norm else super().call_module(target, args, kwargs)

    def run_node(self, node: Node) -> Any:
        value = super().run_node(node)
        sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
        node.meta["sizes"] = tuple(size if size % FAKE_BATCH else None for size in sizes)
        return value


def write_sizes(model: GraphModule, images: tuple[int, int, int]) -> None:
    """Write ``sizes`` into the ``meta`` of each node: those of its tensor, None for an axis that holds the images."""
    for node in model.graph.nodes:
        node.meta["sizes"] = ()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            _FakeRun(model).run(torch.empty(FAKE_BATCH, *images))
        except Exception:  # a few operations know no fake tensors; the sizes behind them stay unknown
            return
