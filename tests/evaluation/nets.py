"""Small float networks on the digits, honestly trained and undefended, and defences that only hide the gradient.

All in plain PyTorch, so that the attacks are judged on networks that no code of this project has touched.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import to_float
from tests.models.small_nets import digits


class Net(nn.Module):
    """Two convolutions and a linear layer, 8 x 8 pixels -> 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[0]

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.relu(self.second(torch.relu(self.first(x)))).flatten(1)
        return self.fc(found), found


@functools.cache
def trained(method: str, seed: int = 0, epsilon: float = 32 / 255) -> nn.Module:
    """``natural``, ``pgd`` (7 steps), ``n-fgsm`` (arXiv:2202.01181), ``smoothed`` (labels smoothed by 0.3) or
    ``natural-binarised``, in eval mode; do not change it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = Binarised() if method == "natural-binarised" else Net()
        images, labels = digits("train")
        x_all = to_float(images)
        epochs = 16 if method in ("pgd", "n-fgsm") else 12
        steps = epochs * (len(x_all) // 64)
        optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, steps)
        for _ in range(steps):
            batch = torch.randint(len(x_all), (64,))
            x, y = x_all[batch], labels[batch]
            if method == "pgd":
                x = _ascend(model, x, y, epsilon=epsilon, steps=7)
            elif method == "n-fgsm":
                noisy = x + 2 * epsilon * (2 * torch.rand_like(x) - 1)
                x = (noisy + epsilon * _gradient(model, noisy, y).sign()).clamp(0, 1)
            loss = functional.cross_entropy(model(x), y, label_smoothing=0.3 if method == "smoothed" else 0.0)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def _ascend(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, steps: int) -> Tensor:
    x_adv = (x + epsilon * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv + epsilon / 3 * _gradient(model, x_adv, y).sign()
        x_adv = torch.clamp(x_adv, x - epsilon, x + epsilon).clamp(0, 1)
    return x_adv


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x), y), x)
    return gradient


class Scaled(nn.Module):
    """Logits times a constant: cross-entropy saturates, or cannot tell the classes apart."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x) * self.factor)


class HardPixels(nn.Module):
    """Pixels are rounded to so many levels; rounding has no gradient."""

    def __init__(self, inner: nn.Module, levels: int) -> None:
        super().__init__()
        self.inner, self.levels = inner, levels

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner((x * (self.levels - 1)).round() / (self.levels - 1)))


class Saturating(nn.Module):
    """A steep sigmoid in place of logits: float32 rounds most of its values to exactly 0."""

    def __init__(self, inner: nn.Module, slope: float) -> None:
        super().__init__()
        self.inner, self.slope = inner, slope

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return torch.sigmoid(self.slope * (logits - logits.amax(dim=1, keepdim=True) + 0.5 / self.slope))


class ResizedAndPadded(nn.Module):
    """The image is enlarged or not and laid somewhere on a canvas, at random in every call (arXiv:1711.01991)."""

    def __init__(self, inner: nn.Module, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.inner, self.generator = inner, generator

    def forward(self, x: Tensor) -> Tensor:
        side = 7 + int(torch.randint(2, (), generator=self.generator))
        small = functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        left, top = (int(torch.randint(9 - side, (), generator=self.generator)) for _ in range(2))
        return torch.as_tensor(self.inner(functional.pad(small, (left, 8 - side - left, top, 8 - side - top))))


class Squeezed(nn.Module):
    """Logits squeezed into a thin band, tanh(z / width) * height."""

    def __init__(self, inner: nn.Module, *, width: float, height: float) -> None:
        super().__init__()
        self.inner, self.width, self.height = inner, width, height

    def forward(self, x: Tensor) -> Tensor:
        return self.height * torch.tanh(self.inner(x) / self.width)


class _Sign(torch.autograd.Function):
    """sign(x), +1 at 0; the gradient passes where |x| <= 1, or everywhere."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, clipped: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.clipped = clipped  # type: ignore[attr-defined]
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.where((x.abs() <= 1) | (not ctx.clipped), grads[0], 0.0), None  # type: ignore[attr-defined]


class Binarised(nn.Module):
    """A network with sign activations, gain times what they need: the signs stay, and the clipped straight-through
    gradient is zero almost everywhere.
    """

    def __init__(self, gain: float = 1.0, *, clipped: bool = True) -> None:
        super().__init__()
        self.gain, self.clipped = gain, clipped
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.as_tensor(_Sign.apply(self.gain * self.norm_1(self.first(x)), self.clipped))
        x = torch.as_tensor(_Sign.apply(self.gain * self.norm_2(self.second(x)), self.clipped))
        logits: Tensor = self.fc(x.flatten(1)) / 8
        return logits


def binarised(*, gain: float, clipped: bool) -> nn.Module:
    """The naturally trained binarised network at another gain or backward rule, with the same answers."""
    model = Binarised(gain, clipped=clipped)
    model.load_state_dict(trained("natural-binarised").state_dict())
    return model.eval().requires_grad_(False)


class FewValues(nn.Module):
    """Answers that take few values, with the answers of the network inside; the gradient is that of its logits.

    ``kind``: ``one-hot`` (times ten), ``rounded`` (probabilities to one decimal), ``votes`` (the argmax of five copies
    whose logits have fixed offsets) or ``clipped`` (logits within a narrow band below the highest one).
    """

    def __init__(self, inner: nn.Module, kind: str, *, differentiable: bool = True) -> None:
        super().__init__()
        self.inner, self.kind, self.differentiable = inner, kind, differentiable
        self.offsets = 0.2 * torch.randn(5, 1, 10, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.as_tensor(self.inner(x))
        best = logits.argmax(dim=1)
        if self.kind == "one-hot":
            answers = 10.0 * functional.one_hot(best, 10)
        elif self.kind == "rounded":
            answers = (10.0 * logits.softmax(dim=1)).round() / 10.0
        elif self.kind == "votes":
            answers = functional.one_hot((logits + self.offsets).argmax(dim=2), 10).sum(dim=0)
        else:
            answers = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=-1e-2)
        return logits + (answers - logits).detach() if self.differentiable else answers.float().detach()
