"""Small networks as users write them, for the tests of the user's own network; each says things its own way."""

from __future__ import annotations

import functools

import torch
from brevitas.backport.fx import GraphModule
from torch import Tensor, nn
from torch.nn import functional

from robustq.models.fx.build import quantized_graph
from robustq.models.fx.fold import fold_graph
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import Widths
from tests.models.small_nets import perturb_batch_norm

SIDE = 12
CLASSES = 5


class Tutorial(nn.Module):
    """PyTorch's MNIST example: biases, no BatchNorm, max pooling in front of ReLU, ``view(-1, n)``, log_softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 12, 2)
        self.drop = nn.Dropout2d(0.3)
        self.fc1 = nn.Linear(48, 16)
        self.fc2 = nn.Linear(16, 16)
        self.fc3 = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(functional.max_pool2d(self.conv1(x), 2))
        x = functional.relu(functional.max_pool2d(self.drop(self.conv2(x)), 2))
        x = x.view(-1, 48)
        x = functional.relu(self.fc1(x))
        x = functional.dropout(x, training=self.training)
        x = torch.relu(self.fc2(x))
        return functional.log_softmax(self.fc3(x), dim=1)


class Normalising(nn.Module):
    """Normalisation inside, by buffers that its state dict does not hold; shared in-place ReLU; a residual sum."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), persistent=False)
        self.std = torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
        self.stem = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.relu_1 = nn.Identity()  # the name that a copy of relu would take
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = self.relu_1(self.relu(self.bn0(self.stem(x))))
        x = self.relu(self.bn1(self.conv(x)) + x)
        x = torch.flatten(self.pool(x), start_dim=1)
        logits: Tensor = self.fc(x)
        return logits


class Inverted(nn.Module):
    """MobileNetV2's block: depthwise, ReLU6, linear bottlenecks and their signed sum; a mean for pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True)
        )
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(inplace=True),
            nn.Conv2d(16, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Conv2d(8, 16, 1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        x = self.head(x).clamp(min=0, max=4)
        logits: Tensor = self.classifier(x.mean([2, 3]))
        return logits


class Branching(nn.Module):
    """Concatenation, average pooling inside, a BatchNorm of its own behind it, a projection without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.mix = nn.Conv2d(10, 8, 3, bias=False)
        self.mix_norm = nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(10, 8, 3)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(8 * 25, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([functional.relu(self.left(x)), functional.relu6(self.right(x))], dim=1)
        x = functional.relu_(self.norm(x))
        x = self.mix_norm(self.mix(x)).add(self.shortcut(x))
        x = self.pool(x.relu())
        logits: Tensor = self.fc(x.reshape(x.size(0), -1))
        return logits


class Gated(nn.Module):
    """Squeeze and excitation, hard swish, a channel shuffle, no linear layer: the last convolution gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2)
        self.last = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        gate = torch.sigmoid(self.expand(functional.relu(self.reduce(self.squeeze(x)))))
        x = x * gate
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)
        first, second = x.chunk(2, dim=1)
        x = functional.relu(self.conv2(functional.pad(first, (1, 0, 0, 1))))
        x = torch.cat([x, functional.max_pool2d(second, 2).clamp(min=0)], 1)
        return functional.adaptive_avg_pool2d(self.last(x), 1).squeeze()


class Splitting(nn.Module):
    """ShuffleNetV2's way: halves of a concatenation, one of them through a layer; flattened, then two classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.act = nn.ReLU()
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.join = nn.Conv2d(8, 4, 1)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(100, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        left, right = torch.chunk(torch.cat((x[:, :4], self.act(self.branch(x[:, 4:]))), dim=1), 2, dim=1)
        x = self.act(self.join(torch.cat([left, self.half_pooled(right)], dim=1)))
        logits: Tensor = self.head(self.hidden(x))
        return logits

    def half_pooled(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 3, stride=1, padding=1)


NETS: dict[str, type[nn.Module]] = {
    "tutorial": Tutorial,
    "normalising": Normalising,
    "inverted": Inverted,
    "branching": Branching,
    "gated": Gated,
    "splitting": Splitting,
}


def float_net(name: str) -> nn.Module:
    """A network in eval mode, far from its initialisation, with fixed weights."""
    torch.manual_seed(len(name))
    net = NETS[name]()
    perturb_batch_norm(net, seed=1)
    return net.eval()


def pixels(count: int = 40, *, seed: int = 0) -> Tensor:
    """uint8 (count, 3, SIDE, SIDE) with flat and busy places."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, SIDE // 3, SIDE // 3), generator=generator)
    noise = torch.randint(-40, 41, (count, 3, SIDE, SIDE), generator=generator)
    return (coarse.repeat_interleave(3, 2).repeat_interleave(3, 3) + noise).clamp(0, 255).to(torch.uint8)


def graph_of(name: str, bits: int, *, act_bits: int | None = None) -> GraphModule:
    """The network at a width, calibrated, in eval mode."""
    graph = quantized_graph(
        float_net(name),
        name=name,
        widths=Widths(bits, bits if act_bits is None else act_bits),
        classes=CLASSES,
        channels=3,
        image_size=SIDE,
    )
    calibrate(graph, pixels(seed=7).float() / 255)
    return graph


@functools.cache
def folded_of(name: str, bits: int) -> GraphModule:
    """Its folded form (shared: do not change it)."""
    return fold_graph(graph_of(name, bits))
