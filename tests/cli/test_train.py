"""robustq train and harden: bit widths, custom models, --compile, Ctrl-C and --resume, and collapse."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustq.checkpoint import load_model, save_model
from robustq.data import Batch
from robustq.hardening import optimization
from robustq.hardening.monitor import HoldoutAccuracy, Monitor
from robustq.hardening.trainer import Training
from robustq.models.compiled import CompiledForward
from robustq.models.spec import ModelSpec, build_model
from tests.cli.conftest import FAST_TRAIN, Run, check_refused

TRAIN = ("train", "--data", "digits", "--arch", "resnet8", *FAST_TRAIN, "--set", "batch_size=25")
COMPILED = (*TRAIN, "--bits", "4", "--out", "run")


def last_line(outcome: Any) -> str:
    assert "Traceback" not in outcome.err
    return str(outcome.err.strip().splitlines()[-1])


def hardened(run: Run, *words: str | Path) -> tuple[str, ModelSpec]:
    """Harden by the natural recipe; the model file and its spec."""
    outcome = run("harden", *words, "--recipe", "natural", *FAST_TRAIN, "--json")
    assert outcome.code == 0, outcome.err
    checkpoint = outcome.json["checkpoint"]
    return checkpoint, load_model(Path(checkpoint))[1]


# --- bit widths ------------------------------------------------------------------------------------------------------


def test_widths_and_scales_of_the_options_are_built_and_kept_by_the_next_run(run: Run, digits_float: Path) -> None:
    Path("bits.toml").write_text('"layer1.0.conv1" = 8\nlayer2.0.relu1 = 2\n')
    single = ("--bits-per-layer", "bits.toml", "--set", "shared_sum_scale=true")
    made, spec = hardened(run, digits_float, "--bits", "8", "--weight-bits", "4", *single)
    assert (spec.weight_bits, spec.act_bits, spec.shared_sum_scale) == (4, 8, True)
    assert dict(spec.layer_bits) == {"layer1.0.conv1": 8, "layer2.0.relu1": 2}
    again, later = hardened(run, made, "--set", "shared_sum_scale=false")
    assert (later.widths, later.layer_bits, later.shared_sum_scale) == (spec.widths, spec.layer_bits, False)
    exported = run("export", again, "--no-recheck", "--images", "60", "--json").json
    assert exported["float_layers"] == [] and exported["shortfalls"] == []
    check_refused(run("harden", made, "--bits", "1", *FAST_TRAIN), "1 bit has no blocks with shared_sum_scale")


@pytest.mark.slow
def test_one_bit_trains_and_is_exported(run: Run, digits_float: Path) -> None:
    made, spec = hardened(run, digits_float, "--bits", "1")
    assert spec.label == "resnet8-w1a1"
    exported = run("export", made, "--format", "packed", "--images", "60", "--out", "bundle", "--json").json
    assert exported["float_layers"] == [] and exported["shortfalls"] == []
    assert all(agreement["different_top1"] == 0 for agreement in exported["parity"].values())
    assert exported["size_bytes"] < 40_000  # 78,000 weights; as bytes they would not fit


@pytest.mark.slow
def test_a_normalisation_of_a_state_dict_stays_in_front(run: Run, digits_float: Path) -> None:
    torch.save(load_model(digits_float)[0].state_dict(), "weights.pt")
    made, spec = hardened(run, "weights.pt", "--data", "digits", "--bits", "4", "--normalisation", "0.3/0.4")
    assert spec.normalisation == ((0.3,), (0.4,))
    exported = run("export", made, "--no-recheck", "--images", "60", "--json").json
    assert len(exported["float_layers"]) == 2 and exported["shortfalls"] == []  # subtraction and division, no more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weight-bits", "7", "--bits", "4"), "weight bits 7 are not in the table"),
        (("--bits", "4", "--act-bits", "32"), "weight bits 4 with activation bits 32"),
        (("--act-bits", "4"), "only one bit width of weights and activations is given (4); add --weight-bits"),
        ((), "no bit width is given; add --bits 4"),
        (("--bits", "4", "--bits-per-layer", "wrong.toml"), "no layer 'layer1.0.conv9'"),
        (("--bits", "4", "--normalisation", "imagenet"), "3 and 3 numbers, the data 1 channels"),
    ],
)
def test_widths_that_cannot_be_are_one_line(
    run: Run, digits_float: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    Path("wrong.toml").write_text('"layer1.0.conv9" = 8\n')
    before = sorted(tmp_path.rglob("*"))
    check_refused(run("harden", digits_float, *words, "--out", "made"), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_quantized_model_keeps_its_normalisation(run: Run, digits_w4a4: Path) -> None:
    check_refused(run("harden", digits_w4a4, "--normalisation", "0.5/0.5"), "was trained with the normalisation none")


# --- custom models ---------------------------------------------------------------------------------------------------

CODE = """
from torch import nn

def build(num_classes):
    dw = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
    return nn.Sequential(dw, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.fixture
def own(run: Run, tmp_path: Path) -> str:
    """module:function in the current folder, beside model.pt that it built."""
    name = f"command_nets_{abs(hash(str(tmp_path))):x}"
    Path(f"{name}.py").write_text(CODE, encoding="utf-8")
    architecture = f"{name}:build"
    spec = ModelSpec(architecture, 4, 4, 10, 1, 8, "digits", None, tuple("0123456789"))
    save_model(Path("model.pt"), build_model(spec, custom_model=architecture), spec)
    return architecture


def test_code_of_a_custom_model_runs_only_when_it_is_named(run: Run, own: str) -> None:
    for command in (("info",), ("attack",), ("export",), ("harden", "--bits", "8")):
        refused = run(command[0], "model.pt", *command[1:])
        check_refused(refused, f"model.pt: was built by {own}; add --model {own} to run that code")
    found = run("info", "model.pt", "--model", own, "--json").json
    assert found["architecture"] == own and found["weight_bits"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --data digits --arch torchvision:resnet81", "no classifier 'resnet81'; nearest: resnet18"),
        ("train --data digits --arch nets:build", "give it as --model nets:build"),
        ("train --data digits --model resnet8", "give --arch resnet8"),
        ("train --data digits --model OWN --arch resnet8", "both set the network"),
    ],
)
def test_a_wrong_architecture_is_one_line(run: Run, own: str, words: str, message: str) -> None:
    refused = run(*words.replace("OWN", own).split())
    assert refused.code == 2 and message in last_line(refused)
    assert not Path("runs").exists()


# --- --compile -------------------------------------------------------------------------------------------------------


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch.compiler.reset()
    forward = functools.partial(CompiledForward, backend=backend)
    monkeypatch.setattr(optimization, "CompiledForward", forward)


def no_compiler(*_: Any) -> Any:
    raise RuntimeError("no compiler today")


def recorded() -> tuple[bool, bool]:
    recipe = json.loads(Path("run/config.json").read_text())["recipe"]
    return recipe["compile"], recipe["cuda_graphs"]


@pytest.mark.slow
def test_a_compiled_run_says_so_and_records_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "eager")
    done = run(*COMPILED, "--compile")
    assert done.code == 0, done.err
    assert "cpu · compiled\n" in done.err and "with --compile" not in done.err
    assert recorded() == (True, False)


def test_no_compile_outweighs_the_recipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, no_compiler)
    done = run(*COMPILED, "--set", "compile=true", "--set", "cuda_graphs=true", "--no-compile")
    assert done.code == 0 and "compiled" not in done.err
    assert recorded() == (False, False)


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_nothing_behind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, no_compiler)
    done = run(*COMPILED, "--compile")
    assert done.code == 2 and not Path("run").exists()
    assert last_line(done) == (
        "robustq: torch.compile does not work here (no compiler today); train without it: --no-compile"
    )


# --- Ctrl-C and --resume ---------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send SIGINT to this process when the run takes its n-th step, the rehearsed ones of the forecast included."""

    def at(step: int) -> None:
        steps: list[int] = []
        take_step = Training.take_step

        def counted(self: Training, batch: Batch) -> Any:
            steps.append(1)
            if len(steps) == step:
                os.kill(os.getpid(), signal.SIGINT)
            return take_step(self, batch)

        monkeypatch.setattr(Training, "take_step", counted)

    return at


def test_ctrl_c_in_training_saves_and_says_how_to_resume(run: Run, interrupted: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupted(5)
    stopped = run(*TRAIN, "--set", "epochs=2", "--json")
    assert stopped.code == 130 and stopped.out == ""
    (folder,) = Path("runs").iterdir()
    assert last_line(stopped).startswith("robustq: stopped after batch ")
    assert last_line(stopped).endswith(f"resume with: robustq train --resume {folder}")
    assert f"stop    Ctrl-C saves the run. Resume it with: robustq train --resume {folder}" in stopped.err
    assert "takes   about" in stopped.err
    resumed = run("train", "--resume", folder, "--json")
    assert resumed.code == 0 and resumed.json["epochs"] == 2
    check_refused(run("harden", "--resume", folder), "has finished, nothing is left")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_step_writes_nothing(run: Run, interrupted: Any) -> None:
    interrupted(2)  # during the forecast
    stopped = run(*TRAIN)
    assert stopped.code == 130
    assert last_line(stopped) == "robustq: stopped; nothing half-written is left behind"
    assert list(Path.cwd().rglob("*")) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train --resume run --recipe natural --seed 0", "--recipe, --seed"),
        ("harden model.pt --resume run", "MODEL"),
        ("harden --resume run --set epochs=3", "--set"),
        ("harden --resume run --out other", "--out"),
    ],
)
def test_options_without_effect_are_refused_with_resume(run: Run, words: str, named: str) -> None:
    check_refused(run(*words.split()), f"{named} cannot be changed with --resume")


def test_nothing_to_resume(run: Run) -> None:
    missing = run("train", "--resume", "runs/none", "--device", "cpu", "--data", "digits", "--json", "--quiet")
    check_refused(missing, "runs/none: no such folder")


# --- collapse and TensorBoard ----------------------------------------------------------------------------------------


def test_a_collapse_ends_the_run_with_exit_1_and_the_best_weights(
    run: Run, digits_float: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Robust on every held-out image in the first epoch, on none afterwards."""
    watch = Monitor.evaluate
    seen: list[int] = []

    def fall(self: Monitor, model: nn.Module) -> HoldoutAccuracy:
        seen.append(1)
        return HoldoutAccuracy(watch(self, model).clean, 1.0 if len(seen) == 1 else 0.0)

    monkeypatch.setattr(Monitor, "evaluate", fall)
    words = ("harden", digits_float, "--bits", "8", *FAST_TRAIN, "--set", "epochs=5")
    stopped = run(*words, "--out", "run", "--json")
    assert stopped.code == 1, stopped.err
    found = stopped.json
    assert found["collapsed"] == {"epoch": 3, "robust": 0.0, "best_epoch": 1, "best": 1.0, "planned": 5}
    assert (found["epochs"], found["epochs_done"], found["best_epoch"]) == (5, 3, 1)
    last = last_line(stopped)
    assert last.startswith("robustq: run: robust accuracy collapsed (catastrophic overfitting): PGD-10 0.0%")
    assert found["shortfalls"] == [last.removeprefix("robustq: ")]
    assert json.loads(Path("run/result.json").read_text()) == found
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert "FAILED  run: robust accuracy collapsed" in run("info", "run").out
    check_refused(run("harden", "--resume", "run"), "--set stop_on_collapse=false")
    again = run(*words, "--set", "stop_on_collapse=false", "--json")
    assert again.code == 0, again.err
    assert (again.json["collapsed"], again.json["shortfalls"], again.json["epochs_done"]) == (None, [], 5)


def test_a_missing_tensorboard_is_found_before_anything_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustq.hardening.metrics.importlib.util.find_spec", lambda name: None)
    refused = run(*TRAIN, "--tensorboard")
    assert refused.code == 2 and not Path("runs").exists()
    assert last_line(refused).startswith("robustq: tensorboard = true needs the package tensorboard")
