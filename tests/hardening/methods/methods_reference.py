"""The training methods beside ODG-Q, line by line from their papers, slow and on purpose without any of robustq's code.

As :mod:`.odgq_reference`, whose net and task loss they share: float64, loops over images and classes,
BatchNorm in sums and SGD spelled out. Each method is a generator: it is sent batches and yields, for every step of the
optimiser, the images it trained on and the loss, before which it has made them. Random numbers are drawn as the methods
say: by torch.rand in float32 from a CPU generator, in the order of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.hardening.methods.odgq_reference import ReferenceNet, task_loss

Batch = tuple[Tensor, Tensor, Tensor]
"""x, y, indices."""


@dataclass
class Made:
    """One step of the optimiser: what was trained on, and by which loss (with gradient)."""

    x_adv: Tensor
    loss: Tensor
    terms: dict[str, float]
    after_backward: Callable[[Tensor], None] = field(default=lambda gradient: None)


Reference = Callable[[int, Batch], Iterator[Made]]
"""(epoch, batch) -> the steps taken on that batch, each made when it is asked for."""


@dataclass
class Task:
    """What every method is given."""

    net: ReferenceNet
    epsilon: float
    seed: int
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def answer(self, x: Tensor, mode: str = "train") -> Tensor:
        """Logits by the running statistics (eval), the batch's (separate), or the batch's moving the running ones."""
        return self.net.forward(x, train=mode != "eval", move=mode == "train")[0]

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean of -sum_k q_k log p_k, with q_y = 1 - s + s/K and the other q_k = s/K."""
        classes, total = logits.shape[1], logits.new_zeros(())
        for i in range(len(y)):
            log_p = logits[i] - torch.log(torch.exp(logits[i]).sum())
            for k in range(classes):
                q = self.smoothing / classes + (1 - self.smoothing if k == int(y[i]) else 0.0)
                total = total - q * log_p[k]
        return total / len(y)

    def uniform(self, x: Tensor, half: float) -> Tensor:
        """Add noise to x: x + U(-half, half), not clamped."""
        u = torch.rand(x.shape, generator=self.generator).double()
        return x + half * (2 * u - 1)

    def into_ball(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest images in the ball around x and in [0, 1]."""
        out = torch.empty_like(x)
        for i in range(len(x)):
            out[i] = torch.max(torch.min(x_adv[i], x[i] + self.epsilon), x[i] - self.epsilon).clamp(0, 1)
        return out


def ascent(x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Sign of the gradient of `loss` at x."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    return torch.sign(gradient)


def divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Mean over the batch of KL(p || q) = sum_k p_k (log p_k - log q_k)."""
    total = q_logits.new_zeros(())
    for p_row, q_row in zip(p_logits, q_logits, strict=True):
        p = torch.exp(p_row) / torch.exp(p_row).sum()
        q = torch.exp(q_row) / torch.exp(q_row).sum()
        for k in range(len(p)):
            total = total + p[k] * (torch.log(p[k]) - torch.log(q[k]))
    return total / len(p_logits)


def pgd(task: Task, *, steps: int, step: float, random_start: bool, mode: str) -> Reference:
    """Madry et al.: x_{t+1} = Pi(x_t + step sign grad CE(x_t)); the attack's labels are not smoothed."""

    def train_on(_: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        x_t = task.into_ball(task.uniform(x, task.epsilon), x) if random_start else x
        for _step in range(steps):
            sign = ascent(x_t, lambda at: task_loss(task.answer(at, mode), y))
            x_t = task.into_ball(x_t + step * sign, x)
        loss = task.cross_entropy(task.answer(x_t), y)
        yield Made(x_t, loss, {"cross_entropy": loss.item()})

    return train_on


def fgsm_rs(task: Task, *, alpha: float, mode: str) -> Reference:
    """Wong et al., Algorithm 3."""

    def train_on(_: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        start = task.into_ball(task.uniform(x, task.epsilon), x)
        sign = ascent(start, lambda at: task_loss(task.answer(at, mode), y))
        x_adv = task.into_ball(start + alpha * sign, x)
        loss = task.cross_entropy(task.answer(x_adv), y)
        yield Made(x_adv, loss, {"cross_entropy": loss.item()})

    return train_on


def n_fgsm(task: Task, *, k: float, alpha: float, mode: str) -> Reference:
    """De Jorge et al., Algorithm 1: no projection."""

    def train_on(_: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        noisy = task.uniform(x, k * task.epsilon).clamp(0, 1)
        sign = ascent(noisy, lambda at: task_loss(task.answer(at, mode), y))
        x_adv = (noisy + alpha * sign).clamp(0, 1)
        loss = task.cross_entropy(task.answer(x_adv), y)
        yield Made(x_adv, loss, {"cross_entropy": loss.item()})

    return train_on


def free(task: Task, *, m: int, step: float, slots: int, image: Tensor) -> Reference:
    """Shafahi et al., Algorithm 1: the gradient of the images comes from the weights' own backward pass."""
    delta = [torch.zeros_like(image) for _ in range(slots)]

    def train_on(_: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        for _repeat in range(m):
            x_adv = torch.stack([(x[i] + delta[i]).clamp(0, 1) for i in range(len(x))]).requires_grad_()
            loss = task.cross_entropy(task.answer(x_adv), y)

            def move(gradient: Tensor) -> None:
                for i in range(len(gradient)):
                    delta[i] = (delta[i] + step * torch.sign(gradient[i])).clamp(-task.epsilon, task.epsilon)

            yield Made(x_adv, loss, {"cross_entropy": loss.item()}, move)

    return train_on


def dq(task: Task, *, beta: float) -> Reference:
    """Lin et al.: beta/2 sum_l ||W_l W_l^T - I||^2, or ||W_l^T W_l - I||^2 where that is the smaller matrix."""

    def train_on(_: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        penalty = x.new_zeros(())
        for name, weight in task.net.parameters.items():
            if name not in ("conv1.weight", "conv2.weight", "fc.weight"):
                continue
            rows = list(weight.flatten(1))
            rows = rows if len(rows) <= len(rows[0]) else list(weight.flatten(1).T)
            for i in range(len(rows)):
                for j in range(len(rows)):
                    penalty = penalty + ((rows[i] * rows[j]).sum() - (1.0 if i == j else 0.0)) ** 2
        ce = task.cross_entropy(task.answer(x), y)
        yield Made(x, ce + beta / 2 * penalty, {"cross_entropy": ce.item(), "orthogonality": penalty.item()})

    return train_on


def fgsm_mep(
    task: Task,
    *,
    alpha: float,
    mu: float,
    lambda_: float,
    reset: int,
    samples: int,
    image: Tensor,
    mode: str,
    through_prior: bool,
) -> Reference:
    """Jia et al.: per-image starts, carried from epoch to epoch along the momentum."""
    delta = [torch.zeros_like(image) for _ in range(samples)]
    momentum = [torch.zeros_like(image) for _ in range(samples)]
    begun: list[int] = []

    def train_on(epoch: int, batch: Batch) -> Iterator[Made]:
        x, y, indices = batch
        if epoch not in begun:
            begun.append(epoch)
            if epoch % reset == 0:
                # Random corners, drawn for all images at once.
                bits = torch.randint(0, 2, (samples, *image.shape), generator=task.generator, dtype=torch.int8)
                for i in range(samples):
                    delta[i] = min(alpha, task.epsilon) * torch.where(bits[i] == 1, 1.0, -1.0).double()
                    momentum[i] = torch.zeros_like(image)
        rows = [int(place) for place in indices]
        x_0 = torch.stack([(x[i] + delta[row]).clamp(0, 1) for i, row in enumerate(rows)]).requires_grad_()
        prior = task.answer(x_0, mode)
        (g,) = torch.autograd.grad(task.cross_entropy(prior, y), x_0, retain_graph=True)
        norm = float(sum(float(value.abs()) for value in g.flatten()))
        x_adv = torch.empty_like(x)
        for i, row in enumerate(rows):
            momentum[row] = g[i] / norm + mu * momentum[row]
            now = (delta[row] + alpha * torch.sign(g[i])).clamp(-task.epsilon, task.epsilon)
            x_adv[i] = (x[i] + now).clamp(0, 1)
            later = (delta[row] + alpha * torch.sign(momentum[row])).clamp(-task.epsilon, task.epsilon)
            delta[row] = torch.min(torch.max(later, -x[i]), 1 - x[i])
        logits = task.answer(x_adv)
        ce = task.cross_entropy(logits, y)
        if mode == "eval" and through_prior:
            prior = task.answer(x_0.detach(), mode)  # by the statistics that x_adv has moved
        square = logits.new_zeros(())
        for i in range(len(x)):
            for k in range(logits.shape[1]):
                square = square + (logits[i, k] - (prior if through_prior else prior.detach())[i, k]) ** 2
        mse = square / logits.numel()
        yield Made(x_adv, ce + lambda_ * mse, {"cross_entropy": ce.item(), "mse": mse.item()})

    return train_on


def nu_at(task: Task, *, alpha: float, lambda_: float, epochs: int, mode: str) -> Reference:
    """Sriramanan et al.: the nuclear norm as the sum of the roots of the eigenvalues of D^T D."""
    batches: dict[int, int] = {}

    def nuclear(a: Tensor, b: Tensor) -> Tensor:
        gap = a - b
        return torch.sqrt(torch.linalg.eigvalsh(gap.T @ gap)).sum() / len(gap)

    def train_on(epoch: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        weight, odd = lambda_ * epoch / epochs, batches.get(epoch, 0) % 2 == 1
        batches[epoch] = batches.get(epoch, 0) + 1
        bits = torch.randint(0, 2, x.shape, generator=task.generator, dtype=torch.int8)
        start = (x + alpha * torch.where(bits == 1, 1.0, -1.0).double()).clamp(0, 1)
        clean = task.answer(x, mode).detach() if odd and weight else None

        def rising(at: Tensor) -> Tensor:
            logits = task.answer(at, mode)
            return task_loss(logits, y) + (0.0 if clean is None else weight * nuclear(logits, clean))

        x_adv = task.into_ball(start + task.epsilon * ascent(start, rising), x)
        logits, natural = task.answer(x_adv), task.answer(x)
        ce, gap = task.cross_entropy(natural, y), nuclear(logits, natural)
        yield Made(x_adv, ce + weight * gap, {"cross_entropy": ce.item(), "nuclear_norm": gap.item()})

    return train_on


def liet(
    task: Task, *, lambda_: float, epochs: int, renew: int, s: float, classes: int, image: Tensor, mode: str
) -> Reference:
    """The authors' steps, with the divergence as two sums over classes."""
    guides: list[Tensor] = []
    batches: dict[int, int] = {}
    small = task.epsilon <= 8 / 255

    def smoothed(logits: Tensor, shares: Tensor, y: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for i in range(len(y)):
            log_p = logits[i] - torch.log(torch.exp(logits[i]).sum())
            others = sum(float(shares[i, k]) for k in range(classes) if k != int(y[i]))
            for k in range(classes):
                total = total - (1 - s if k == int(y[i]) else s * float(shares[i, k]) / others) * log_p[k]
        return total / len(y)

    def train_on(epoch: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        if batches.get(epoch, 0) % renew == 0:
            shares = torch.rand((classes, classes), generator=task.generator).double()
            grey = torch.full((classes, *image.shape), 0.5, dtype=torch.float64)
            labels = torch.arange(classes)
            guides[:] = task.epsilon * ascent(grey, lambda at: smoothed(task.answer(at, "eval"), shares, labels))
        batches[epoch] = batches.get(epoch, 0) + 1
        places = torch.rand(x.shape, generator=task.generator)
        values = torch.rand(x.shape, generator=task.generator).double()
        share, coin = torch.rand(2, generator=task.generator)
        noise = task.epsilon * (1 if small else 2) * (2 * values - 1)
        delta = torch.stack([guides[int(label)] for label in y])
        delta[places < 0.1 + share * 0.4] = noise[places < 0.1 + share * 0.4]
        x_0 = (x + delta if coin >= 0.5 else x - delta).clamp(0, 1).requires_grad_()
        prior = task.answer(x_0, mode)
        shares = torch.rand((len(y), classes), generator=task.generator).double()
        (g,) = torch.autograd.grad(smoothed(prior, shares, y), x_0, retain_graph=True)
        shares = torch.rand((len(y), classes), generator=task.generator).double()
        moved = x_0.detach() + task.epsilon * torch.sign(g)
        x_adv = task.into_ball(moved, x) if small else moved.clamp(0, 1)
        logits = task.answer(x_adv)
        if mode == "eval":
            prior = task.answer(x_0.detach(), mode)  # by the statistics that x_adv has moved
        ce = smoothed(logits, shares, y)
        middle = torch.log((torch.softmax(prior, 1) + torch.softmax(logits, 1)) / 2)
        gap = (divergence(prior, middle) + divergence(logits, middle)) / 2
        loss = ce + lambda_ * (epoch + 1) / epochs * gap
        yield Made(x_adv, loss, {"cross_entropy": ce.item(), "jensen_shannon": gap.item()})

    return train_on


def trades(task: Task, *, beta: float, steps: int, step: float, start: float, mode: str) -> Reference:
    """Zhang et al., Algorithm 1, but for the width of the start."""

    def train_on(_: int, batch: Batch) -> Iterator[Made]:
        x, y, _indices = batch
        clean = task.answer(x, mode).detach()
        near = torch.stack(
            [torch.max(torch.min(a, b + start), b - start) for a, b in zip(task.uniform(x, start), x, strict=True)]
        )
        x_t = task.into_ball(near.clamp(0, 1), x)
        for _step in range(steps):
            sign = ascent(x_t, lambda at: divergence(clean, task.answer(at, mode)))
            x_t = task.into_ball(x_t + step * sign, x)
        natural = task.answer(x)
        logits = task.answer(x_t)
        ce, kl = task.cross_entropy(natural, y), divergence(natural, logits)
        yield Made(x_t, ce + beta * kl, {"cross_entropy": ce.item(), "kl": kl.item()})

    return train_on


def rslad(
    task: Task, *, teacher: Callable[[Tensor], Tensor], clean: float, steps: int, step: float, start: float, mode: str
) -> Reference:
    """Zi et al., Eq. 6 and 7: soft labels everywhere."""

    def train_on(_: int, batch: Batch) -> Iterator[Made]:
        x, _y, _indices = batch
        soft = teacher(x)
        near = torch.stack(
            [torch.max(torch.min(a, b + start), b - start) for a, b in zip(task.uniform(x, start), x, strict=True)]
        )
        x_t = task.into_ball(near.clamp(0, 1), x)
        for _step in range(steps):
            sign = ascent(x_t, lambda at: divergence(soft, task.answer(at, mode)))
            x_t = task.into_ball(x_t + step * sign, x)
        kl = divergence(soft, task.answer(x_t))
        if clean == 0:
            yield Made(x_t, kl, {"kl": kl.item()})
            return
        natural = divergence(soft, task.answer(x))
        yield Made(x_t, (1 - clean) * kl + clean * natural, {"kl": kl.item(), "clean_kl": natural.item()})

    return train_on


@dataclass
class Sgd:
    """v <- 0.9 v + g + 5e-4 w; w <- w - eta v."""

    net: ReferenceNet
    eta: float

    def __post_init__(self) -> None:
        self.velocity: dict[str, Tensor] = {}

    def step(self, made: Made) -> dict[str, Tensor]:
        """Differentiate, tell the method, move the weights; the gradients."""
        names = list(self.net.parameters)
        wrt = [self.net.parameters[name] for name in names]
        if made.x_adv.requires_grad:
            *gradients, images = torch.autograd.grad(made.loss, [*wrt, made.x_adv])
            made.after_backward(images)
        else:
            gradients = list(torch.autograd.grad(made.loss, wrt))
        for name, g in zip(names, gradients, strict=True):
            weight = self.net.parameters[name]
            pull = g + 5e-4 * weight.detach()
            self.velocity[name] = 0.9 * self.velocity[name] + pull if name in self.velocity else pull
            self.net.parameters[name] = (weight.detach() - self.eta * self.velocity[name]).requires_grad_()
        return dict(zip(names, gradients, strict=True))
