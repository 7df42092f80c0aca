"""Mean and standard deviation inside the model: the first operation, in float, of a network that was trained with them.

Images enter every robustq model as pixel / 255. Weights that were trained on normalised images (torchvision's are) keep
their meaning when the same mean and deviation stand in front; epsilon stays a distance between pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustq.errors import UsageError

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, standard deviation), one number per channel each, of images in [0, 1]."""

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What torchvision's pretrained weights expect."""


class Normalise(nn.Module):
    """(x - mean) / std per channel; its constants are part of the spec, not of the weights.

    Args:
        normalisation: mean and standard deviation, both of as many channels as the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [0, 1] -> the same shape, normalised."""
        return (x - self.mean) / self.std


def parse_normalisation(text: str, *, channels: int) -> Normalisation | None:
    """``imagenet``, ``none``, or ``MEAN/STD`` with comma-separated numbers: ``0.49,0.48,0.45/0.25,0.24,0.26``.

    One number stands for every channel.

    Raises:
        UsageError: not numbers, another count than ``channels``, or a deviation that is not over 0.
    """
    advice = "give imagenet, none, or MEAN/STD such as 0.49,0.48,0.45/0.25,0.24,0.26"
    if text == "none":
        return None
    if text == "imagenet":
        rows: list[tuple[float, ...]] = list(IMAGENET)
    else:
        try:
            rows = [tuple(float(number) for number in half.split(",")) for half in text.split("/")]
        except ValueError as error:
            raise UsageError(f"normalisation '{text}' is not numbers; {advice}") from error
        if len(rows) != 2:
            raise UsageError(f"normalisation '{text}' has {len(rows)} parts between '/', not 2; {advice}")
        rows = [row * channels if len(row) == 1 else row for row in rows]
    mean, std = rows
    if len(mean) != channels or len(std) != channels:
        raise UsageError(f"normalisation '{text}' has {len(mean)} and {len(std)} numbers, the data {channels} channels")
    if not all(abs(value) < 1e6 for value in mean) or not all(0.0 < value < 1e6 for value in std):
        raise UsageError(f"normalisation '{text}' needs finite means and deviations over 0; {advice}")
    return mean, std
