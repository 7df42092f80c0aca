"""robustq info and robustq recipes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import robustq
from robustq.checkpoint import load_model
from robustq.hardening.methods.registry import resolved_recipe
from robustq.models.spec import build_model
from robustq.recipe import load_recipe, recipe_names
from robustq.report.recipes import toml_lines
from robustq.seals import sha256
from tests.cli.conftest import Run
from tests.models.small_nets import small_spec


def test_the_list_has_every_recipe(run: Run) -> None:
    found = run("recipes", "--json").json
    assert {recipe["name"] for recipe in found["recipes"]} == set(recipe_names())
    lines = run("recipes").out.splitlines()
    assert set(recipe_names()) <= {line.split()[0] for line in lines if line} and max(map(len, lines)) <= 120


def test_a_printed_recipe_is_a_recipe_of_the_same_values(tmp_path: Path) -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        resolved = resolved_recipe(recipe)
        printed = "\n".join(toml_lines({**resolved, **recipe.metadata()}))
        own = tmp_path / "own.toml"
        own.write_text(printed, encoding="utf-8")
        copy = load_recipe(str(own))
        assert resolved_recipe(copy) == {**resolved, "name": str(own)}
        assert copy.paper_rows == {}  # a changed copy must not claim the rows of the paper's tables
        for key, value in resolved.items():
            if key not in ("name", "settings"):
                assert re.search(rf"^# {key}: \w" if value is None else rf"^{key} = ", printed, re.MULTILINE), key


def test_any_text_survives_printing(run: Run) -> None:
    odd = 'a "quoted" \\ word,\ttab \x7f and \x01 é'
    text = 'method = "natural"\nepochs = 1\nbatch_size = 8\nlr = 1e-7\nepsilon = 0.1\nsummary = '
    Path("odd.toml").write_text(text + json.dumps(odd).replace("\x7f", "\\u007f"), encoding="utf-8")
    Path("again.toml").write_text(run("recipes", "odd.toml").out, encoding="utf-8")
    recipe = load_recipe("again.toml")
    assert (recipe.summary, recipe.lr, recipe.epsilon) == (odd, 1e-7, 0.1)


def test_a_recipe_for_absent_data_is_one_clear_line(
    run: Run, digits_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUSTQ_DATA", str(tmp_path / "nothing"))
    for words in (("train",), ("harden", digits_float)):
        outcome = run(*words, "--recipe", "imagenet/resnet18-w4a4-odgq", "--device", "cpu")
        assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1
        assert outcome.err.startswith("robustq: imagenet is not in ") and "--data FOLDER" in outcome.err


def test_info_describes_a_model_file(run: Run, digits_w4a4: Path) -> None:
    found = run("info", digits_w4a4, "--json").json
    spec = load_model(digits_w4a4)[1]
    assert robustq.describe_file(str(digits_w4a4)) == found
    assert (found["kind"], found["label"], found["data"]) == ("model", "resnet8-w4a4", "digits")
    assert found["sha256"] == sha256(digits_w4a4) and found["epsilon"] == spec.epsilon
    # The scales that quantizers learn are none of the network's own.
    plain = build_model(replace(spec, weight_bits=32, act_bits=32))
    assert found["parameters"] == sum(parameter.numel() for parameter in plain.parameters())
    bits = {layer["name"]: layer["weight_bits"] for layer in found["layers"]}
    assert bits["conv1"] == bits["fc"] == 8 and bits["layer2.0.conv1"] == 4 and len(bits) == 10
    told = run("info", digits_w4a4).out
    for part in (
        "resnet8 · 77,754 parameters · 4-bit weights, 4-bit activations",
        "digits (10 classes, 1 channels, 8x8 pixels)",
        "radius  32/255",
        "layers  4-bit weights: layer1.0.conv1 ... layer3.0.downsample.0 (8 layers)",
        "holdout clean accuracy",
        sha256(digits_w4a4),
    ):
        assert part in told


def test_info_of_a_run_folder_has_its_result(run: Run, digits_w4a4: Path) -> None:
    folder = digits_w4a4.parent
    found = run("info", folder, "--json").json
    assert found["kind"] == "run folder" and found["finished"] is True
    assert found["result"] == json.loads((folder / "result.json").read_text())
    assert found["sha256"] == {"best.pt": sha256(digits_w4a4)}
    assert f"clean   {found['result']['clean_accuracy']:.1%} on 359 test images" in run("info", folder).out


@pytest.mark.parametrize("format_name", [pytest.param("qonnx", marks=pytest.mark.slow), "integer"])
def test_info_reads_widths_from_the_onnx_file_itself(run: Run, digits_w4a4: Path, format_name: str) -> None:
    run("export", digits_w4a4, "--format", format_name, "--images", "5", "--out", "bundle")
    bundle = run("info", "bundle", "--json").json
    record = json.loads(Path("bundle/bundle.json").read_text())
    assert bundle["kind"] == "export folder" and bundle["format"] == format_name
    for key in ("sha256", "parity", "integer_layers", "shortfalls", "versions", "recheck"):
        assert bundle[key] == record[key], key
    (file,) = Path("bundle").glob("*.onnx")
    found = run("info", file, "--json").json
    assert found["kind"] == "onnx" and found["format"] == format_name
    assert {key: value for key, value in found.items() if key in bundle["onnx"]} == bundle["onnx"]
    assert [layer["weight_bits"] for layer in found["layers"]] == [8, *[4] * 8, 8]
    assert found["images"] == {"layout": "nchw", "pixels": "unit", "found_in": "metadata of robustq"}
    assert {row["bits"] for row in found["quantizers"]} == {4, 8} and found["no_gradient"] == []
    assert all(row["scale"]["per"] == "channel" for row in found["layers"])
    first = found["quantizers"][0]["scale"]
    assert first["low"] == first["high"] == pytest.approx(1 / 255)
    told = run("info", file).out
    if format_name == "integer":
        assert found["integer_layers"] == bundle["integer_layers"] and found["float_layers"] == []
        assert f"runs {len(found['integer_layers'])} of {len(found['integer_layers'])} as integers" in told
    else:
        assert found["integer_layers"] is None and "runs    not in onnxruntime: it has operators of QONNX" in told
    assert f"format  {format_name}" in told and "layers  4-bit weights" in told and sha256(file) in told
    limits = [f"not for {limit}" for limit in record["not_for"]]
    assert found["not_for"] == record["not_for"] and limits and set(limits) <= set(told.splitlines())
    told = run("info", "bundle").out
    assert set(limits) <= set(told.splitlines())
    assert f"robust  at most {record['recheck']['robust_accuracy']:.1%}" in told and "(5 images, not judged)" in told
    assert f"{file.name} ({file.stat().st_size / 1000:,.0f} kB)" in told
    robust = next(line for line in told.splitlines() if line.startswith("robust"))
    assert robust in run("info", file).out.splitlines()  # the file alone holds it, too


def test_info_of_files_of_others(run: Run, digits_float: Path) -> None:
    state = {f"module.{name}": value for name, value in load_model(digits_float)[0].state_dict().items()}
    torch.save({"state_dict": state}, "weights.pt")
    told = run("info", "weights.pt")
    assert "state dict" in told.out and "network resnet8 · 77,754 parameters · float" in told.out
    # He's ResNet-20 has 269,722 parameters (arXiv:1512.03385 rounds to 0.27 M) and 1,395 values of buffers.
    torch.save(build_model(replace(small_spec(32), architecture="resnet20-a", channels=3)).state_dict(), "20.pt")
    assert run("info", "20.pt", "--json").json["parameters"] == 269_722
    torch.save({"state_dict": state, "ema": {"w.weight": torch.ones(2)}, "best_prec1": 91.25}, "weights.pt")
    told = run("info", "weights.pt")
    assert "the set state_dict, other sets: ema (--weights KEY)" in told.out and "stated  accuracy 91.2%" in told.out
    floats = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = onnx.helper.make_tensor("w", floats, [2, 3], [0.5] * 6)
    ends = [onnx.helper.make_tensor_value_info(name, floats, ["n", size]) for name, size in (("x", 2), ("y", 3))]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])), "foreign.onnx")
    foreign = run("info", "foreign.onnx", "--json").json
    layer = {"name": "y", "kind": "MatMul", "shape": [2, 3], "weight_bits": 32, "scale": None}
    assert foreign["layers"] == [layer] and foreign["stored_values"] == 6
    assert foreign["integer_layers"] == [] and foreign["float_layers"] == ["MatMul(y)"]
    shown = run("info", "foreign.onnx").out
    assert "not written by robustq" in shown and "images  no classifier of images: input 'x' is" in shown


def test_info_opens_the_folder_of_quickstart(run: Run, digits_w4a4: Path) -> None:
    row = {"model": "w4a4-hardened", "clean": 0.9, "fgsm": 0.8, "pgd20": 0.7, "margin_pgd40": 0.6, "size_bytes": 1000}
    content = {
        "rows": [{**row, "worst_case": 0.5, "worst_case_interval": [0.4, 0.6]}],
        "test_images": 9,
        "epsilon": 0.1,
        "seconds": 1.0,
        "folder": "gone",
        "shortfalls": [],
    }
    shutil.copytree(digits_w4a4.parent, "quick/w4a4-hardened")
    Path("quick/result.json").write_text(json.dumps(content))
    told = run("info", "quick")
    assert told.code == 0, told.err
    assert any(line.startswith("w4a4-hardened  90.0%") for line in told.out.splitlines())
    assert f"run     {Path('quick/w4a4-hardened').absolute()}" in told.out.splitlines()
    Path("quick/result.json").write_text(json.dumps({**content, "rows": [row]}))
    refused = run("info", "quick")
    assert refused.code == 2 and "worst_case is missing or has another form" in refused.err


def test_info_refuses_unknown_files(run: Run) -> None:
    Path("text.pt").write_text("text")
    Path("text.onnx").write_text("text")
    Path("folder").mkdir()
    Path("run").mkdir()
    Path("run/config.json").write_text("{")
    for name in ("none.pt", "text.pt", "text.onnx", "folder", "run"):
        told = run("info", name)
        assert told.code == 2 and len(told.err.strip().splitlines()) == 1
        assert told.err.startswith(f"robustq: {name}")
