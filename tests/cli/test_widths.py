"""Widths from the command line: what is asked for is what is built, and what cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from robustq.checkpoint import load_model
from tests.cli.conftest import Run

SHORT = ("--set", "epochs=1", "--set", "train_images=200", "--set", "monitor_images=50", "--device", "cpu")


def result_of(run: Run, *words: str) -> dict[str, Any]:
    outcome = run(*words, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_weights_and_activations_have_their_own_options(run: Run, digits_float: Path) -> None:
    made = result_of(
        run, "harden", str(digits_float), "--bits", "8", "--weight-bits", "2", "--recipe", "natural", *SHORT
    )
    _, spec, _ = load_model(Path(made["checkpoint"]))
    assert (spec.weight_bits, spec.act_bits, spec.layer_bits) == (2, 8, ())


@pytest.mark.slow
def test_one_bit_trains_and_is_exported(run: Run, digits_float: Path) -> None:
    made = result_of(run, "harden", str(digits_float), "--bits", "1", *SHORT)
    _, spec, _ = load_model(Path(made["checkpoint"]))
    assert spec.label == "resnet8-w1a1"
    exported = result_of(run, "export", made["checkpoint"], "--format", "packed", "--images", "60", "--out", "bundle")
    assert exported["float_layers"] == [] and exported["shortfalls"] == []
    assert all(agreement["different_top1"] == 0 for agreement in exported["parity"].values())
    assert exported["size_bytes"] < 40_000  # 78,000 weights; as bytes they would not fit


@pytest.mark.slow
def test_layers_of_their_own_width_are_built_kept_and_exported(run: Run, digits_float: Path) -> None:
    Path("bits.toml").write_text('"layer1.0.conv1" = 8\nlayer2.0.relu1 = 2\n')
    words = ("--recipe", "natural", "--bits", "4", "--bits-per-layer", "bits.toml")
    made = result_of(run, "harden", str(digits_float), *words, *SHORT)
    _, spec, _ = load_model(Path(made["checkpoint"]))
    assert dict(spec.layer_bits) == {"layer1.0.conv1": 8, "layer2.0.relu1": 2}
    again = result_of(run, "harden", made["checkpoint"], "--recipe", "natural", *SHORT)
    _, later, _ = load_model(Path(again["checkpoint"]))
    assert later.layer_bits == spec.layer_bits  # nothing else was asked for
    exported = result_of(run, "export", made["checkpoint"], "--no-recheck", "--images", "60")
    assert exported["float_layers"] == [] and exported["shortfalls"] == []


def test_one_scale_for_both_inputs_of_a_sum_is_kept_by_the_next_run(run: Run, digits_float: Path) -> None:
    short = ("--recipe", "natural", *SHORT)
    made = result_of(run, "harden", str(digits_float), "--bits", "4", "--set", "shared_sum_scale=true", *short)
    _, spec, _ = load_model(Path(made["checkpoint"]))
    assert spec.shared_sum_scale
    again = result_of(run, "harden", made["checkpoint"], *short)
    assert load_model(Path(again["checkpoint"]))[1].shared_sum_scale  # nothing else was asked for
    apart = result_of(run, "harden", made["checkpoint"], "--set", "shared_sum_scale=false", *short)
    assert not load_model(Path(apart["checkpoint"]))[1].shared_sum_scale
    binary = run("harden", made["checkpoint"], "--bits", "1", *short)
    assert binary.code == 2 and binary.err.startswith("robustq: 1 bit has no blocks with shared_sum_scale")


@pytest.mark.slow
def test_a_normalisation_of_a_state_dict_stays_in_front(run: Run, digits_float: Path) -> None:
    torch.save(load_model(digits_float)[0].state_dict(), "weights.pt")
    words = ("--data", "digits", "--bits", "4", "--recipe", "natural", "--normalisation", "0.3/0.4")
    made = result_of(run, "harden", "weights.pt", *words, *SHORT)
    _, spec, _ = load_model(Path(made["checkpoint"]))
    assert spec.normalisation == ((0.3,), (0.4,))
    exported = result_of(run, "export", made["checkpoint"], "--no-recheck", "--images", "60")
    assert len(exported["float_layers"]) == 2 and exported["shortfalls"] == []  # subtraction and division, no more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bits", "5"), "weight bits 5 are not in the table"),
        (("--weight-bits", "7", "--bits", "4"), "weight bits 7 are not in the table"),
        (("--bits", "4", "--act-bits", "32"), "weight bits 4 with activation bits 32"),
        (("--weight-bits", "4"), "only one of weights and activations has a width (4 bits); add --act-bits"),
        (("--act-bits", "4"), "only one of weights and activations has a width (4 bits); add --weight-bits"),
        ((), "nothing says how many bits it shall have; add --bits 4"),
        (("--bits", "4", "--bits-per-layer", "absent.toml"), "absent.toml cannot be read"),
        (("--bits", "4", "--bits-per-layer", "wrong.toml"), "no layer 'layer1.0.conv9'"),
        (("--bits", "4", "--normalisation", "imagenet"), "3 and 3 numbers, the data 1 channels"),
        (("--bits", "4", "--normalisation", "grey"), "normalisation 'grey' is not numbers"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, digits_float: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    Path("wrong.toml").write_text('"layer1.0.conv9" = 8\n')
    before = sorted(tmp_path.rglob("*"))
    outcome = run("harden", str(digits_float), *words, "--out", "made")
    assert outcome.code == 2 and message in outcome.err.strip().splitlines()[-1], outcome.err
    assert "Traceback" not in outcome.err and sorted(tmp_path.rglob("*")) == before


def test_a_quantized_model_keeps_its_normalisation(run: Run, digits_w4a4: Path) -> None:
    outcome = run("harden", str(digits_w4a4), "--normalisation", "0.5/0.5")
    assert outcome.code == 2 and "was trained with the normalisation none" in outcome.err
