"""Parts of random networks: layers that stay in float, and operations that move, choose or repeat values."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Make = Callable[[], nn.Module]


class Function(nn.Module):
    """A function of x and of further modules."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


class Blur(nn.Module):
    """A fixed blur with stride 2."""

    kernel: Tensor

    def __init__(self, channels: int, *, persistent: bool) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (row[:, None] * row).expand(channels, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (1, 1, 1, 1), mode="reflect")
        return functional.conv2d(x, self.kernel, stride=2, groups=x.shape[1])


def in_float(rng: random.Random, channels: int) -> nn.Module:
    """A layer without an integer form; it keeps the number of channels."""
    groups = rng.choice([size for size in (1, 2, 4) if channels % size == 0])
    kernel = rng.choice((1, 2))
    return rng.choice(
        (
            *(nn.GELU(), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.LeakyReLU(0.1), nn.Softplus()),
            *(nn.GroupNorm(groups, channels), nn.InstanceNorm2d(channels, affine=rng.random() < 0.5)),
            Function(lambda x, norm: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.LayerNorm(channels)),
            nn.ConvTranspose2d(channels, channels, kernel, kernel, bias=rng.random() < 0.5),
            Function(lambda x: x.softmax(1)),
            Function(lambda x: functional.mish(x).square() - 0.5),
        )
    )


def moves(rng: random.Random, channels: int, side: int) -> nn.Module:
    """A function that moves, chooses or repeats values, as far as the feature map has room for it."""
    first, second, size = rng.choice((-1, 0, 1, 2)), rng.choice((-1, 0, 1)), rng.randint(2, 12)
    found: list[nn.Module] = [
        Function(lambda x: functional.pad(x, (first, second, second, first))),
        Function(lambda x: functional.max_pool2d(functional.pad(x, (1, 1, 1, 1)), 3, 2)),
        Function(lambda x: functional.relu6(x) + functional.relu(x)),
        Function(lambda x: torch.roll(x, (1, 1), (1, 3))),
        Function(lambda x: torch.stack([x, x.flip(3), x.relu()]).sum(0)),
        Function(lambda x: torch.cat([x, x.amax(1, keepdim=True)], 1)),
        Function(lambda x: functional.interpolate(x, size=size)),
        Function(lambda x, mix: mix(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2), nn.Linear(channels, 6)),
        nn.Conv2d(channels, 6, 3, padding=1, padding_mode=rng.choice(("reflect", "replicate", "circular"))),
        Blur(channels, persistent=rng.random() < 0.5),
        Attention(channels),
    ]
    if side <= 8:
        found.append(nn.Upsample(scale_factor=rng.choice((1.5, 2))))
    if channels % 4 == 0:
        found.append(nn.PixelShuffle(2))
    return rng.choice(found)


class Attention(nn.Module):
    """Tokens of a feature map that look at one another, with one more token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.mix, self.out = (
            nn.LayerNorm(channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, 4),
        )
        self.token = nn.Parameter(torch.randn(1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = torch.cat([self.token.expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        query, key, value = self.mix(self.norm(x)).chunk(3, dim=2)
        weights = (query @ key.transpose(1, 2) * channels**-0.5).softmax(2)
        x = self.out(x + weights @ value)[:, 1:]
        return x.transpose(1, 2).reshape(batch, 4, height, width)
