"""Calibration, monitor, evaluation, resuming and folding on the pretended device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from robustq.attacks import ATTACKS
from robustq.data import Augment, to_float
from robustq.evaluation.run_suite import run_suite
from robustq.evaluation.suites import NamedAttack, Suite
from robustq.evaluation.target import Target
from robustq.hardening.monitor import Monitor
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.spec import build_model
from tests.gpu_pretend.device import counting, pretended
from tests.hardening import tiny


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended() as device:
        yield device


def test_calibration_neither_waits_nor_copies(device: torch.device) -> None:
    torch.manual_seed(0)
    model, x = build_model(tiny.spec(4)), to_float(tiny.split().images)
    calibrate(model, x, from_scratch=True)
    wanted = [threshold.log_threshold.clone() for threshold in learned_thresholds(model).values()]
    with torch.no_grad():
        for threshold in learned_thresholds(model).values():
            threshold.log_threshold.fill_(7.0)
    model, x = model.to(device), x.to(device)
    with counting(strict=True) as counts:
        calibrate(model, x, from_scratch=True)
    assert counts.kernels <= 5400
    found = [threshold.log_threshold.cpu() for threshold in learned_thresholds(model).values()]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-5, rtol=0)  # float32 rounding


def training(device: torch.device) -> Training:
    settings = tiny.recipe("odgq", epochs=1, settings={"global_perturbation": "noise"}, ema_decay=0.9)
    model = tiny.network(4).to(device)
    x, y = to_float(tiny.split(seed=6).images[:8]).to(device), tiny.split(seed=6).labels[:8].to(device)
    monitor = Monitor(x, y, epsilon=tiny.EPSILON, batch_size=8, seed=1)
    method = tiny.build(settings, model, device=device)
    made = tiny.training(model, settings, method=method, monitor=monitor, augment=Augment(crop_padding=1, flip=True))
    made.device = device
    made.__post_init__()
    return made


def test_a_run_that_was_saved_after_a_batch_ends_with_the_same_weights(device: torch.device) -> None:
    """Batches, steps, averages, checks for NaN, the monitor; the noise continues where it was."""
    whole = training(device)
    tiny.finish(whole)
    assert whole.state.rows[0]["holdout_pgd10_accuracy"] is not None
    half = training(device)
    half.take_step(next(half.epoch_batches()))
    saved = tiny.begin(half)
    resumed = training(device)
    resumed.load_state_dict(saved.load())
    resumed.run(saved, StopRequest())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value.cpu(), resumed.model.state_dict()[name].cpu()), name


def test_an_evaluation_and_the_folded_network(device: torch.device) -> None:
    model, spec = tiny.network(4).eval(), tiny.spec(4)
    split = tiny.split()
    folded = fold(model.to(device), spec).to(device).eval()
    x = to_float(split.images[:6]).to(device)
    with torch.no_grad():
        # The folded network rounds its biases to int32.
        torch.testing.assert_close(folded(x).cpu(), model(x).cpu(), atol=0.05, rtol=0.05)
    names = ("pgd", "apgd", "square")
    few = tuple(
        NamedAttack(name, ATTACKS[name], {"queries" if name == "square" else "steps": 2}, uses="gradients")
        for name in names
    )
    suite = Suite("few", few, checks_masking=False)
    labels = model(x).argmax(dim=1).cpu()
    found = run_suite(Target.of(model), split.images[:6], labels, suite=suite, epsilon=tiny.EPSILON, device=device)
    assert [result.name for result in found.results] == list(names)
