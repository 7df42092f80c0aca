"""A pretended GPU: torch's PrivateUse1 device, whose tensors hold CPU tensors and compute on the CPU.

Values are right, so that whole trainings and attacks run on it. As on CUDA

- an operation on tensors of both devices raises, but for CPU scalars in elementwise operations and CPU indices, which
  are copied;
- random numbers need a generator of the device;
- an operation whose result has a size, or a Python value, that depends on the data makes the host wait.

It counts kernels (operations that are no views: a lower bound), host waits, and copies to the device that block.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten

WAITS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.repeat_interleave),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.is_nonzero, aten.multinomial),
    # The solver reports failure to the host.
    *(aten._linalg_svd, aten._linalg_eigh, aten.linalg_cholesky_ex, aten.linalg_inv_ex),
}
"""Operations that end when the device has ended, beside copies to the host and boolean indices."""

NO_KERNEL = {
    aten.empty_like,
    aten.new_empty,
    aten.new_empty_strided,
    aten.lift_fresh,
    aten._reshape_alias,
    aten._unsafe_view,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FACTORIES = (
    *(aten.arange.start_step, aten.arange.start, aten.arange.default, aten.linspace.default, aten.logspace.default),
    *(aten.randperm.default, aten.randperm.generator, aten.eye.default, aten.eye.m),
    *(aten.triu_indices.default, aten.tril_indices.default),
)
CHANGES_SHAPE = {aten.resize_, aten.set_, aten.squeeze_, aten.unsqueeze_, aten.transpose_, aten.t_}


class MixedDevicesError(RuntimeError):
    """Tensors or generators of two devices in one operation."""


class HostWaitError(RuntimeError):
    """A host wait where none is allowed."""


class BlockingCopyError(RuntimeError):
    """A blocking copy to the device where none is allowed."""


@dataclass
class Counts:
    """Work since the beginning of `counting`."""

    kernels: int = 0
    by_name: Counter[str] = field(default_factory=Counter)  # kernels, by operation
    waits: Counter[str] = field(default_factory=Counter)  # by operation
    copies: Counter[str] = field(default_factory=Counter)  # blocking ones to the device, by operation
    strict: bool = False

    def wait(self, name: str) -> None:
        self.waits[name] += 1
        if self.strict:
            raise HostWaitError(f"the host waits in {name}")

    def copy(self, name: str, source: Tensor) -> None:
        self.copies[name] += 1
        if self.strict:
            raise BlockingCopyError(f"{name} copies {source.numel() * source.element_size()} bytes to the device")


_active: list[Counts] = []


@contextmanager
def counting(*, strict: bool = False) -> Iterator[Counts]:
    """Count the device's work; with ``strict`` raise at a host wait and at a blocking copy to the device."""
    counts = Counts(strict=strict)
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.pop()


class PretendTensor(Tensor):
    """A tensor of the device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = inner
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        host: Any = self.cpu()
        return host.__reduce_ex__(protocol)  # a saved state is read on the CPU

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses it for subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        found: list[Tensor] = []
        held_args, held_kwargs = _without(args, found), {key: _without(value, found) for key, value in kwargs.items()}
        host = [one for one in found if not isinstance(one, PretendTensor)]
        _check(func, args, kwargs, host)
        _count(func, args, kwargs)
        held_kwargs.pop("pin_memory", None)
        to_host = "device" in held_kwargs and torch.device(held_kwargs.pop("device") or NAME).type == "cpu"
        result = func(*held_args, **held_kwargs)
        if to_host:
            return result
        # An operation in place returns its argument; a copy to the host that of the CPU.
        known = {id(_held(one)): one for one in found}
        if isinstance(result, Tensor):
            return known[id(result)] if id(result) in known else PretendTensor(result)
        return tree_map(lambda one: _wrapped(one, known), result)


def _without(value: Any, found: list[Tensor]) -> Any:
    """A value of an operation with CPU tensors in the place of the device's; appends all tensors to ``found``."""
    if isinstance(value, Tensor):
        found.append(value)
        return value.held if isinstance(value, PretendTensor) else value
    return [_without(one, found) for one in value] if isinstance(value, list | tuple) else value


def _wrapped(value: Any, known: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else PretendTensor(value)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, PretendTensor)


def _check(func: Any, args: Any, kwargs: Any, host: list[Tensor]) -> None:
    """Raise where CUDA would."""
    packet = func.overloadpacket
    if packet in CHANGES_SHAPE or (packet is aten.as_strided_ and tuple(args[1]) != tuple(args[0].shape)):
        raise NotImplementedError(f"the pretended device has no {func}")
    generator = kwargs.get("generator")
    if generator is not None:
        _check_generator(func, generator)
    if not host or packet in (aten.copy_, aten._to_copy):
        return
    # Indices, and a scalar value to write, may be the host's.
    value_fits = len(args) < 3 or not _on_cpu(args[2]) or args[2].dim() == 0
    if packet in INDEXING and value_fits and not _on_cpu(args[0]):
        return
    scalars = torch.Tag.pointwise in func.tags or packet in (aten.fill_, aten.masked_fill_, aten.masked_fill)
    if scalars and all(one.dim() == 0 for one in host) and not _written_on_cpu(func, args, kwargs):
        return
    shapes = ", ".join(str(tuple(one.shape)) for one in host)
    raise MixedDevicesError(f"{func} got tensors of {NAME} and of the CPU; those of the CPU have shapes {shapes}")


def _check_generator(func: Any, generator: torch.Generator) -> None:
    # torch hands over another object for the same generator; its state tells.
    state = generator.get_state()
    if not any(torch.equal(state, one.get_state()) for one in PretendGenerator.of_device):
        raise MixedDevicesError(f"{func} on {NAME} got a generator of the CPU")


def _written_on_cpu(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operation writes to a tensor of the CPU."""
    named = [*zip(func._schema.arguments, args, strict=False)]
    named += [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]
    return any(one.alias_info is not None and one.alias_info.is_write and _on_cpu(value) for one, value in named)


def _count(func: Any, args: Any, kwargs: Any) -> None:
    packet, name = func.overloadpacket, str(func)
    returns = func._schema.returns
    is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    if is_view or packet in NO_KERNEL:
        return
    waits, copied = packet in WAITS, None
    if packet is aten.copy_:
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if _on_cpu(args[1]) and not non_blocking:
            copied = args[1]
        waits = _on_cpu(args[0]) and not non_blocking
    elif packet is aten._to_copy:
        target = kwargs.get("device")
        waits = target is not None and torch.device(target).type == "cpu" and not kwargs.get("non_blocking")
    elif packet in INDEXING:
        indices = [one for one in args[1] if one is not None]
        value = args[2] if len(args) > 2 else None
        fills = value is not None and _on_cpu(value) and value.numel() == 1 and len(indices) == 1  # a masked fill
        waits = any(one.dtype in (torch.bool, torch.uint8) for one in indices) and not fills
        copied = next((one for one in indices if _on_cpu(one)), None)
    for counts in _active:
        counts.kernels += 1
        counts.by_name[name] += 1
    for counts in _active[::-1]:
        if waits:
            counts.wait(name)
        if copied is not None:
            counts.copy(name, copied)


_Generator = torch.Generator


class PretendGenerator(_Generator):
    """torch.Generator that can also belong to the device."""

    of_device: ClassVar[weakref.WeakSet[PretendGenerator]] = weakref.WeakSet()

    def __new__(cls, device: Any = "cpu") -> PretendGenerator:
        pretends = torch.device(device).type == NAME
        made: PretendGenerator = super().__new__(cls, "cpu" if pretends else device)  # type: ignore[call-arg]
        if pretends:
            cls.of_device.add(made)
        return made


class _Module:
    """torch.pretend: what torch asks a device's module for."""

    available = False  # outside of `pretended` nothing in the process sees a device

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.available

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return int(self.available)


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _module.available

    def has_primary_context(self, _: int) -> bool:
        return _module.available

    def is_built(self) -> bool:
        return True


_module = _Module()
_library: torch.library.Library | None = None


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return PretendTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """`torch.tensor` copies without Python's dispatch."""
    _count(aten.copy_.default, (target, source, non_blocking), {})
    _held(target).copy_(_held(source))
    return target


def _factory(func: Any) -> Callable[..., Tensor]:
    """A function that makes a tensor, for those whose result torch makes by resizing an empty one."""

    def make(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("generator") is not None:
            _check_generator(func, kwargs["generator"])
        for counts in _active:
            counts.kernels += 1
        kept = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "layout")}
        return PretendTensor(func(*args, **kept))

    return make


def _register() -> None:
    """Once a process."""
    global _library
    if _library is not None:
        return
    # Autograd starts a thread for each device that it knows at its first backward pass, and after that no child of a
    # fork can differentiate, as other tests do. Registered behind such a pass, the device gets no thread.
    torch.ones(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    _setup_privateuseone_for_python_backend(NAME, backend_module=_module, hook=_Hooks())
    _library = library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    implement: Any = library.impl
    implement("empty.memory_format", _empty, "PrivateUse1")
    implement("empty_strided", _empty_strided, "PrivateUse1")
    implement("_copy_from", _copy_from, "PrivateUse1")
    for func in FACTORIES:
        implement(func._name.removeprefix("aten::"), _factory(func), "PrivateUse1")


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Within it the device exists; yields it."""
    _register()
    _module.available, torch.Generator = True, PretendGenerator  # type: ignore[misc]
    try:
        # Without threads backward passes run in this one.
        with torch.autograd.set_multithreading_enabled(False):
            yield torch.device(NAME, 0)
    finally:
        _module.available, torch.Generator = False, _Generator  # type: ignore[misc]
