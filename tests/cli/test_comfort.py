"""What people expect of a command: --version, --quiet, --verbose, colour, Ctrl-C, progress, warnings, recipes, info."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision

import robustq
from robustq import progress
from robustq.checkpoint import load_model
from robustq.errors import RobustqWarning
from robustq.files import sha256
from robustq.hardening.methods.registry import resolved_recipe
from robustq.recipe import load_recipe, recipe_names
from tests.cli.conftest import Run

FAST_TRAIN = ("--set", "epochs=1", "--set", "train_images=100", "--device", "cpu")
FEW = ("--images", "5", "--epsilon", "0")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- versions, quiet, verbose ----------------------------------------------------------------------------------------


def test_version_names_what_a_result_depends_on(run: Run) -> None:
    told = run("--version")
    assert told.code == 0
    for name in ("robustq", "torch", "brevitas", "onnx", "onnxruntime", "qonnx"):
        assert f"{name} {version(name)}" in told.out
    assert "python 3." in told.out


@pytest.mark.parametrize(
    "place", [pytest.param("before", marks=pytest.mark.slow), "after", pytest.param("short", marks=pytest.mark.slow)]
)
def test_quiet_leaves_the_result_alone(run: Run, digits_w4a4: Path, place: str) -> None:
    arguments: tuple[str | Path, ...] = ("export", digits_w4a4, "--images", "5", "--no-recheck")
    option = "-q" if place == "short" else "--quiet"
    quiet = run(option, *arguments) if place == "before" else run(*arguments, option)
    assert quiet.code == 0 and quiet.err == ""
    assert "layers  onnxruntime runs" in quiet.out
    if place == "before":
        assert "checking it on 5 test images" in run(*arguments).err


def test_verbose_tells_every_setting(run: Run, digits_float: Path) -> None:
    told = run("harden", digits_float, "--bits", "8", "-v", *FAST_TRAIN)
    assert told.code == 0
    for line in ("epochs = 1", "[odgq]", 'update = "batch"', "momentum = 0.9", "seed 0"):
        assert f"setting {line}" in told.err
    told = run("--verbose", "attack", digits_float, *FEW)
    assert "setting epsilon 0/255 (0.000000) · seed 0 · cpu" in told.err


@pytest.mark.parametrize("place", ["before", "after"])
def test_verbose_keeps_the_traceback_of_bad_input(run: Run, place: str) -> None:
    told = run("-v", "attack", "none.pt") if place == "before" else run("attack", "none.pt", "-v")
    assert told.code == 2
    lines = told.err.strip().splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("robustq: none.pt: no such file")
    assert "Traceback" not in run("attack", "none.pt").err  # one call leaves nothing to the next


def test_quiet_and_verbose_exclude_each_other(run: Run) -> None:
    for arguments in (("-q", "-v", "recipes"), ("-q", "recipes", "-v"), ("recipes", "-v", "-q")):
        told = run(*arguments)
        assert told.code == 2 and "--quiet and --verbose exclude each other" in told.err


@pytest.mark.parametrize(("option", "theirs"), [("--quiet", False), ("--json", False), ("--verbose", True)])
def test_warnings_of_ours_are_shown_and_those_of_libraries_with_verbose_only(
    run: Run, monkeypatch: pytest.MonkeyPatch, option: str, theirs: bool
) -> None:
    def warn() -> list[str]:
        warnings.warn("a library's", DeprecationWarning, stacklevel=1)
        warnings.warn("of\nours", RobustqWarning, stacklevel=1)
        return ["odgq"]

    monkeypatch.setattr("robustq.recipe.recipe_names", warn)
    before = warnings.showwarning
    told = run("recipes", option)
    assert "robustq: warning: of ours\n" in told.err
    assert ("a library's" in told.err) == theirs
    assert warnings.showwarning is before


@pytest.mark.slow
def test_a_whole_job_shows_no_warning_of_a_library(tmp_path: Path, digits_w4a4: Path) -> None:
    """In a fresh process, where nothing was warned of before: Brevitas, both exporters and onnxruntime are loaded."""
    command = [sys.executable, "-c", "from robustq.cli import main; main()", "export", str(digits_w4a4)]
    command += ["--images", "5", "--no-recheck", "--format", "qonnx", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- colour and progress ---------------------------------------------------------------------------------------------


def draw(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    progress.show(True)
    try:
        with progress.bar("work", 10) as drawn:
            for _ in range(10):
                drawn.advance(1, "text")
                time.sleep(0.02)  # rich draws ten times a second
    finally:
        progress.show(False)
    return stream.getvalue()


COLOUR = re.compile(r"\x1b\[[\d;]*(3[0-8]|9[0-7])[;m]")


def test_a_bar_has_colour_on_a_terminal_only_and_none_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert COLOUR.search(draw(monkeypatch, Terminal()))
    assert draw(monkeypatch, io.StringIO()) == ""
    monkeypatch.setenv("NO_COLOR", "1")
    shown = draw(monkeypatch, Terminal())
    assert "work" in shown and not COLOUR.search(shown)


def test_nothing_piped_has_colour(tmp_path: Path) -> None:
    for arguments in (["--help"], ["harden", "--help"], ["recipes"], ["harden", "none.pt"]):
        command = [sys.executable, "-c", "from robustq.cli import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "\x1b" not in done.stdout + done.stderr


def test_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress.show(True)
    try:
        with progress.bar("outer", 2) as outer, progress.bar("inner", 2) as inner:
            inner.advance(2)
            outer.advance(2)
    finally:
        progress.show(False)
    assert "inner" not in stream.getvalue()


@pytest.mark.parametrize("job", ["attack", pytest.param("export", marks=pytest.mark.slow), "train", "download"])
def test_long_jobs_show_progress(
    run: Run, monkeypatch: pytest.MonkeyPatch, digits_w4a4: Path, tmp_path: Path, job: str
) -> None:
    labels: dict[str, float] = {}

    def recording(label: str, total: float, unit: str = "img") -> Any:
        labels[label] = total
        return whole(label, total, unit)

    class Archive:
        """As much of a torchvision set as downloads."""

        classes = ("0", "1")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if not download:
                raise RuntimeError("Dataset not found")
            with torchvision.datasets.utils.tqdm(total=3000, unit="B", unit_scale=True) as drawn:
                drawn.update(3000)
            self.data, self.targets = torch.zeros(40, 28, 28, dtype=torch.uint8), torch.arange(40) % 2

    whole = progress.bar
    for module in (
        "evaluation.campaign",
        "evaluation.accuracy",
        "export.parity",
        "export.qonnx_file",
        "hardening.trainer",
        "workflow.training_run",
        "data.download",
    ):
        monkeypatch.setattr(f"robustq.{module}.bar", recording)
    monkeypatch.setattr(torchvision.datasets, "MNIST", Archive)
    monkeypatch.setenv("ROBUSTQ_DATA", str(tmp_path / "root"))
    arguments: dict[str, tuple[str | Path, ...]] = {
        "attack": ("attack", digits_w4a4, "--suite", "recheck", "--images", "5"),
        "export": ("export", digits_w4a4, "--images", "5", "--no-recheck", "--format", "qonnx"),
        "train": ("train", "--data", "digits", "--architecture", "resnet8", *FAST_TRAIN),
        "download": ("train", "--data", "mnist", "--architecture", "resnet8", *FAST_TRAIN[:2], "--device", "cpu"),
    }
    expected: dict[str, dict[str, float]] = {
        "attack": {"attack: pgd20": 5, "predict": 5},
        "export": {"qonnx executor": 5, "parity: optimised": 5},
        "train": {"natural": 100, "test": 359},
        "download": {"download mnist": 3.0},
    }
    outcome = run(*arguments[job])
    assert outcome.code == 0, outcome.err
    assert expected[job].items() <= labels.items(), labels


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stopped_at", "arguments"),
    [
        pytest.param("robustq.workflow.export.prove", ("export", "--images", "5"), marks=pytest.mark.slow),
        ("robustq.workflow.export.write_record", ("export", "--images", "5", "--no-recheck")),
        ("robustq.workflow.attack.run_suite", ("attack", *FEW, "--out", "found.json")),
        ("robustq.files.os.fsync", ("attack", *FEW, "--out", "found.json")),
        ("robustq.workflow.train.quantize", ("harden", "--bits", "2", *FAST_TRAIN)),
    ],
)
def test_ctrl_c_leaves_nothing_half_written(
    run: Run, digits_w4a4: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: str, arguments: tuple[str, ...]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped_at, stop)
    outcome = run(arguments[0], digits_w4a4, *arguments[1:])
    assert outcome.code == 130
    assert outcome.err.strip().splitlines()[-1] == "robustq: stopped; nothing half-written is left behind"
    assert "Traceback" not in outcome.err
    assert [path for path in Path.cwd().rglob("*") if path.is_file()] == []


# --- recipes and info ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_runs_again_as_given(run: Run, tmp_path: Path, name: str) -> None:
    printed = run("recipes", name)
    own = tmp_path / "own.toml"
    own.write_text(printed.out, encoding="utf-8")
    resolved = resolved_recipe(load_recipe(name))
    assert resolved_recipe(load_recipe(str(own))) == {**resolved, "name": str(own)}
    assert run("recipes", name, "--json").json["recipes"] == [{**resolved, **load_recipe(name).claims()}]
    # Every value is there: what is open says in a comment what settles it.
    for key, value in resolved.items():
        if key not in ("name", "settings"):
            assert re.search(rf"^# {key}: \w" if value is None else rf"^{key} = ", printed.out, re.MULTILINE), key
    for key in resolved["settings"]:
        assert re.search(rf"^{key} = ", printed.out, re.MULTILINE), key


def test_a_recipe_for_known_data_leaves_nothing_open_but_what_the_model_says() -> None:
    resolved = resolved_recipe(load_recipe("cifar10/resnet20-w4a4-odgq"))
    assert [key for key, value in resolved.items() if value is None] == ["shared_sum_scale"]
    assert (resolved["crop_padding"], resolved["flip"]) == (4, True)
    assert resolved_recipe(load_recipe("odgq"))["crop_padding"] is None


def test_any_text_survives_printing(run: Run, tmp_path: Path) -> None:
    odd = 'a "quoted" \\ word,\ttab \x7f and \x01 é'
    source = tmp_path / "odd.toml"
    text = 'method = "natural"\nepochs = 1\nbatch_size = 8\nlr = 1e-7\nepsilon = 0.1\nsummary = '
    source.write_text(text + json.dumps(odd).replace("\x7f", "\\u007f"), encoding="utf-8")
    again = tmp_path / "again.toml"
    again.write_text(run("recipes", source).out, encoding="utf-8")
    recipe = load_recipe(str(again))
    assert (recipe.summary, recipe.lr, recipe.epsilon) == (odd, 1e-7, 0.1)


def test_info_says_what_a_model_file_holds(run: Run, digits_w4a4: Path) -> None:
    found = run("info", digits_w4a4, "--json").json
    network, spec, _ = load_model(digits_w4a4)
    assert robustq.describe_file(str(digits_w4a4)) == found
    assert (found["kind"], found["label"], found["data"]) == ("model", "resnet8-w4a4", "digits")
    assert found["sha256"] == sha256(digits_w4a4) and found["epsilon"] == spec.epsilon
    assert found["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    bits = {layer["name"]: layer["weight_bits"] for layer in found["layers"]}
    assert bits["conv1"] == bits["fc"] == 8 and bits["layer2.0.conv1"] == 4 and len(bits) == 10
    assert 0 <= found["info"]["holdout_clean_accuracy"] <= 1
    told = run("info", digits_w4a4).out
    for part in (
        "resnet8 · 77,767 parameters · 4-bit weights, 4-bit activations",
        "digits (10 classes, 1 channels, 8x8 pixels)",
        "radius  32/255",
        "layers  8-bit weights: conv1",
        "layers  4-bit weights: layer1.0.conv1 ... layer3.0.downsample.0 (8 layers)",
        "holdout clean accuracy",
        sha256(digits_w4a4),
    ):
        assert part in told


@pytest.mark.parametrize(
    "format_name",
    [pytest.param("qonnx", marks=pytest.mark.slow), pytest.param("qcdq", marks=pytest.mark.slow), "integer"],
)
def test_info_reads_widths_from_the_onnx_file_itself(run: Run, digits_w4a4: Path, format_name: str) -> None:
    run("export", digits_w4a4, "--format", format_name, "--no-recheck", "--images", "5", "--out", "bundle")
    bundle = run("info", "bundle", "--json").json
    record = json.loads(Path("bundle/bundle.json").read_text())
    assert bundle["kind"] == "export folder" and bundle["format"] == format_name
    for key in ("sha256", "parity", "integer_layers", "shortfalls", "versions"):
        assert bundle[key] == record[key], key
    (file,) = Path("bundle").glob("*.onnx")
    found = run("info", file, "--json").json
    assert found["kind"] == "onnx" and found["format"] == format_name
    assert {key: value for key, value in found.items() if key in bundle["onnx"]} == bundle["onnx"]
    assert [layer["weight_bits"] for layer in found["layers"]] == [8, *[4] * 8, 8]
    assert found["spec"]["architecture"] == "resnet8"
    told = run("info", file).out
    assert f"format  {format_name}" in told and "layers  4-bit weights" in told and sha256(file) in told
    told = run("info", "bundle").out
    assert f"format  {format_name}" in told and sha256(file) in told


@pytest.mark.slow
def test_info_of_an_export_folder_has_its_accuracies_and_of_a_run_its_result(run: Run, digits_w4a4: Path) -> None:
    run("export", digits_w4a4, "--images", "5", "--out", "bundle")
    told = run("info", "bundle").out
    recheck = run("info", "bundle", "--json").json["recheck"]
    assert f"robust  at most {recheck['robust_accuracy']:.1%}" in told and "(5 images, not judged)" in told
    folder = digits_w4a4.parent
    found = run("info", folder, "--json").json
    assert found["kind"] == "run folder" and found["finished"] is True
    assert found["result"] == json.loads((folder / "result.json").read_text())
    assert found["sha256"] == {"best.pt": sha256(digits_w4a4)}
    assert f"clean   {found['result']['clean_accuracy']:.1%} on 359 test images" in run("info", folder).out


def test_info_of_what_others_wrote(run: Run, digits_float: Path) -> None:
    state = {f"module.{name}": value for name, value in load_model(digits_float)[0].state_dict().items()}
    torch.save({"state_dict": state}, "weights.pt")
    told = run("info", "weights.pt")
    assert "state dict" in told.out and "resnet8" in told.out and "float" in told.out
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    floats = onnx.TensorProto.FLOAT
    weight = onnx.helper.make_tensor("w", floats, [2, 3], [0.5] * 6)
    ends = [onnx.helper.make_tensor_value_info(name, floats, ["n", size]) for name, size in (("x", 2), ("y", 3))]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    onnx.save(onnx.helper.make_model(graph), "foreign.onnx")
    foreign = run("info", "foreign.onnx", "--json").json
    assert foreign["layers"] == [{"name": "y", "kind": "MatMul", "shape": [2, 3], "weight_bits": 32}]
    assert "not written by robustq" in run("info", "foreign.onnx").out


@pytest.mark.parametrize("name", ["none.pt", "text.pt", "text.onnx", "empty.onnx", "folder", "run"])
def test_info_refuses_what_it_does_not_know(run: Run, name: str) -> None:
    Path("text.pt").write_text("text")
    Path("text.onnx").write_text("text")
    Path("empty.onnx").touch()
    Path("folder").mkdir()
    Path("run").mkdir()
    Path("run/config.json").write_text("{")
    told = run("info", name)
    assert told.code == 2 and len(told.err.strip().splitlines()) == 1
    assert told.err.startswith(f"robustq: {name}")


HEAVY = {"brevitas", "numpy", "onnx", "onnxruntime", "torch"}
EARLY = [
    ("harden", "none.pt"),
    ("attack", "none.pt"),
    ("attack", "lone.onnx"),
    ("export", "none.pt"),
    ("recheck", "none"),
    ("info", "none.pt"),
    ("harden", "text.pt", "--recipe", "none"),
    ("train", "--recipe", "none.toml"),
    ("attack", "text.pt", "--epsilon", "8/0"),
]


def test_what_is_plainly_missing_is_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    """In one fresh process: after all these refusals it has still not loaded torch."""
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "lone.onnx").write_text("x")
    program = f"""
import json, sys
from robustq.cli import main
codes = []
for words in {EARLY!r}:
    sys.argv = ["robustq", *words]
    try:
        main()
    except SystemExit as stopped:
        codes.append(stopped.code)
print(json.dumps([codes, sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    codes, modules = json.loads(done.stdout)
    assert codes == [2] * len(EARLY), done.stderr
    assert len(done.stderr.strip().splitlines()) == len(EARLY), done.stderr
    assert not HEAVY & set(modules)


def test_help_names_every_command_and_stays_light(run: Run) -> None:
    told = run("--help").out
    for command in ("quickstart", "train", "harden", "attack", "export", "recheck", "info", "recipes"):
        assert re.search(rf"^  {command} ", told, re.MULTILINE), command
        shown = run(command, "--help").out
        for option in ("--json", "--quiet", "--verbose"):
            assert option in shown, (command, option)
