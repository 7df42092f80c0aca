"""Algorithm 1 of ODG-Q (arXiv:2210.08701), line by line, slow and on purpose without any of robustq's code.

Written from the paper's text and the default readings of our design notes alone: one Python loop over epochs, batches,
images and domains, an MMD of two nested loops, BatchNorm in sums and products, and SGD spelled out. The net is a float
conv-bn-relu-conv-bn-relu-pool-linear whose parameters are plain leaf tensors, so that no module's train or eval flag
can hide which statistics a forward pass uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


@dataclass
class Settings:
    """The inputs of Algorithm 1, in its letters."""

    N_k: int
    epsilon: float
    epsilon_l: float
    lambda_: float
    eta: float
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass
class Step:
    """What one pass of the inner loop left behind; every tensor is a copy."""

    epoch: int
    k: int
    x_g: Tensor
    x_adv: Tensor
    task_loss: float
    mmd_loss: float
    gradients: dict[str, Tensor]
    running: dict[str, Tensor]
    P: Tensor
    parameters: dict[str, Tensor]


class ReferenceNet:
    """h(.): parameters by the names of the tests' module twin, and the running statistics of two BatchNorms."""

    def __init__(self, parameters: dict[str, Tensor], running: dict[str, Tensor]) -> None:
        self.parameters = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        self.running = {name: value.detach().clone() for name, value in running.items()}

    def _batch_norm(self, x: Tensor, name: str, *, train: bool, move: bool) -> Tensor:
        if train:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            mean = x.sum(dim=(0, 2, 3)) / count
            var = ((x - mean.view(1, -1, 1, 1)) ** 2).sum(dim=(0, 2, 3)) / count
            if move:
                unbiased = var.detach() * count / (count - 1)
                for key, new in ((f"{name}.running_mean", mean.detach()), (f"{name}.running_var", unbiased)):
                    self.running[key] = (1 - BN_MOMENTUM) * self.running[key] + BN_MOMENTUM * new
        else:
            mean, var = self.running[f"{name}.running_mean"], self.running[f"{name}.running_var"]
        normal = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + BN_EPS).sqrt()
        gamma, beta = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return gamma.view(1, -1, 1, 1) * normal + beta.view(1, -1, 1, 1)

    def forward(self, x: Tensor, *, train: bool, move: bool) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and features (N, D): the tensor that enters global pooling, average-pooled.

        train: batch statistics instead of running ones; move: the running statistics take the batch's in.
        """
        h = functional.conv2d(x, self.parameters["conv1.weight"], padding=1)
        h = torch.clamp(self._batch_norm(h, "bn1", train=train, move=move), min=0)
        h = functional.conv2d(h, self.parameters["conv2.weight"], padding=1, stride=2)
        h = torch.clamp(self._batch_norm(h, "bn2", train=train, move=move), min=0)
        features = h.sum(dim=(2, 3)) / (h.shape[2] * h.shape[3])
        logits = features @ self.parameters["fc.weight"].T + self.parameters["fc.bias"]
        return logits, features


def task_loss(logits: Tensor, y: Tensor) -> Tensor:
    """L_task: the mean over the batch of -log softmax at the label (appendix: "the task loss (cross-entropy)")."""
    total = logits.new_zeros(())
    for i in range(len(y)):
        total = total - torch.log(torch.exp(logits[i, y[i]]) / torch.exp(logits[i]).sum())
    return total / len(y)


def mmd_loss(a: Tensor, b: Tensor) -> Tensor:
    """L_MMD: Eq. 5's norm, sqrt(biased MMD^2 + 1e-8), with k(u, v) = exp(-|u - v|^2 / (2 sigma^2)).

    sigma^2: the median distance^2 of all pairs of the joint sample, a constant for the gradient. Of an even number of
    pairs the lower of the two middle ones: the design notes leave it open, and torch.median does it.
    """
    joint = [*a, *b]
    pairs = sorted(
        float(((joint[i] - joint[j]) ** 2).sum().detach()) for i in range(len(joint)) for j in range(i + 1, len(joint))
    )
    sigma2 = pairs[(len(pairs) - 1) // 2]

    def mean_kernel(us: Tensor, vs: Tensor) -> Tensor:
        total = us.new_zeros(())
        for u in us:
            for v in vs:
                total = total + torch.exp(-((u - v) ** 2).sum() / (2 * sigma2))
        return total / (len(us) * len(vs))

    return torch.sqrt(mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b) + 1e-8)


def train(
    net: ReferenceNet, epochs: Sequence[Sequence[tuple[Tensor, Tensor]]], settings: Settings, *, slots: int
) -> list[Step]:
    """Algorithm 1 over `epochs`, each a list of batches (x_0, y) of at most `slots` images; a trace of it all."""
    epsilon, N_k = settings.epsilon, settings.N_k
    image = epochs[0][0][0][0]
    # Line 1: the global perturbation set, N_k domains of B images of zeros, and k = 0.
    P = [[torch.zeros_like(image) for _ in range(slots)] for _ in range(N_k)]
    k = 0
    velocity: dict[str, Tensor] = {}
    trace: list[Step] = []
    # Line 2: while epoch <= N_e / 2 (halving is the recipe's business).
    for epoch, batches in enumerate(epochs):
        # Line 3: while batch <= N_b.
        for x_0, y in batches:
            x_g = torch.empty_like(x_0)
            for i in range(len(x_0)):
                # Line 4: the perturbation of domain k. Image i of the batch has slot i: a short batch uses the first.
                p_g = P[k][i]
                # Line 5: clipped on use, added to the natural image; images stay in [0, 1].
                x_g[i] = torch.clamp(x_0[i] + torch.clamp(p_g, -epsilon, epsilon), 0, 1)
            # Line 6: the gradient at x_g, under the running statistics, which stay as they are.
            x_g.requires_grad_()
            logits, _ = net.forward(x_g, train=False, move=False)
            (g_x,) = torch.autograd.grad(task_loss(logits, y), x_g)
            x_g = x_g.detach()
            x_adv = torch.empty_like(x_0)
            for i in range(len(x_0)):
                # Line 7: the local perturbation.
                p_l = settings.epsilon_l * torch.sign(g_x[i])
                # Line 8: into the domains k..N_k-1, both ends included, as a raw sum.
                for domain in range(k, N_k):
                    P[domain][i] = P[domain][i] + p_l
                # Line 9: on top of x_g, so up to 2 epsilon from x_0; images stay in [0, 1].
                x_adv[i] = torch.clamp(x_g[i] + torch.clamp(p_l, -epsilon, epsilon), 0, 1)
            # Line 10: task loss on x_adv, plus lambda times the MMD of the features of x_adv and x_0, each under the
            # statistics of its own batch. x_0's side is a constant, and only x_adv moves the running statistics.
            _, features_0 = net.forward(x_0, train=True, move=False)
            logits, features_adv = net.forward(x_adv, train=True, move=True)
            task, mmd = task_loss(logits, y), mmd_loss(features_adv, features_0.detach())
            names = list(net.parameters)
            g_theta = torch.autograd.grad(task + settings.lambda_ * mmd, [net.parameters[name] for name in names])
            # Line 11: one SGD step (with momentum and weight decay, which the paper does not mention).
            for name, g in zip(names, g_theta, strict=True):
                parameter = net.parameters[name]
                pull = g + settings.weight_decay * parameter.detach()
                velocity[name] = settings.momentum * velocity[name] + pull if name in velocity else pull
                net.parameters[name] = (parameter.detach() - settings.eta * velocity[name]).requires_grad_()
            trace.append(
                Step(
                    epoch=epoch,
                    k=k,
                    x_g=x_g,
                    x_adv=x_adv,
                    task_loss=float(task.detach()),
                    mmd_loss=float(mmd.detach()),
                    gradients=dict(zip(names, g_theta, strict=True)),
                    running=dict(net.running),
                    P=torch.stack([torch.stack(domain) for domain in P]),
                    parameters={name: value.detach().clone() for name, value in net.parameters.items()},
                )
            )
        # Line 13: the next domain, once an epoch.
        k = (k + 1) % N_k
    # Line 15: the parameters are in `net`.
    return trace
