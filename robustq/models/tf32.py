"""Whether a GPU may round what float32 convolutions and matrix products multiply to TF32.

TF32 keeps 10 of float32's 23 bits behind the point. torch allows it for convolutions unless it is told otherwise
(``torch.backends.cudnn.allow_tf32``), so that a quantizer behind one would meet other values, and answer with other
codes, than on a CPU or on the device that runs the exported file. On a CPU these flags change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def forbid_tf32() -> None:
    """Compute float32 in float32 on every GPU of this process from now on."""
    _allow(convolutions=False, products=False)


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Within it convolutions and matrix products may round to TF32, or may not; then what was true before is again."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    _allow(convolutions=allowed, products=allowed)
    try:
        yield
    finally:
        _allow(convolutions=convolutions, products=products)


def _allow(*, convolutions: bool, products: bool) -> None:
    # Not by the newer fp32_precision: whoever reads these flags afterwards, torch itself included, would get an error.
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products
