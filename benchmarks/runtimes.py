"""Parity of exported files with the folded PyTorch network in other runtimes: format x runtime x version, as a table.

    python -m benchmarks.runtimes --model best.pt [more.pt ...] [--formats qcdq integer packed qonnx]
                                  [--runtimes onnxruntime onnxruntime-1.18.1 openvino ...] [--images 0]
                                  [--epsilon 32/255] [--environments runs/environments]

The models are quantized model files of robustq, such as those of `make quickstart` (4 bits) and

    robustq harden FLOAT.pt --bits 2 --recipe natural --set epochs=3

Each is written in every format and runs on its test images and, with --epsilon, on as many adversarial ones (PGD-20 on
the folded network, rounded to uint8), which show differences most often.

Every runtime has an environment of its own in --environments, made from the pins in RUNTIMES and kept until they
change: with uv or venv and pip, for Node.js with npm. A runtime that cannot be installed is a row that says so.

To add a runtime: an entry in RUNTIMES, and a script in benchmarks/runners that runs in the environment without robustq:

    python RUNNER FILE.onnx IMAGES.npy LOGITS.npy --setting NAME

It reads float32 images (N, C, H, W), writes float32 logits (N, K), and prints one line of JSON: ``version``,
``integer_layers``, ``float_layers`` (null if the runtime does not report them). If the runtime refuses the file, the
exit status is not 0 and the last line of stderr is the reason.

Cells: images with the network's class; largest logit difference as a share of the logit range; integer layers, float
layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.output import make_parser
from robustq import progress
from robustq.attacks.generators import ImageGenerators
from robustq.attacks.pgd import pgd
from robustq.checkpoint import load_model
from robustq.data import to_float
from robustq.errors import RobustqError
from robustq.export.formats import build, check_format
from robustq.export.parity import Agreement, compare, logits_of
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec
from robustq.workflow.setup import data_for

RUNNERS = Path(__file__).parent / "runners"
FOR_HLS4ML = "qonnx --for hls4ml"
QCDQ_LIKE = ("qcdq", "integer", "packed")
INSTALL_SECONDS, RUN_SECONDS = 900, 900


@dataclass(frozen=True)
class Runtime:
    """A runtime at one version.

    Args:
        family, version: names in the table.
        runner: file in benchmarks/runners.
        packages: pinned packages.
        bare_packages: pinned packages, installed without their dependencies. If both are empty, robustq's own
            environment is used.
        settings: settings of the runner.
        formats: formats to run.
        kind: type of environment.
    """

    family: str
    version: str
    runner: str
    packages: tuple[str, ...]
    bare_packages: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("default",)
    formats: tuple[str, ...] = QCDQ_LIKE
    kind: Literal["python", "node"] = "python"

    @property
    def is_here(self) -> bool:
        """Whether it runs in robustq's own environment."""
        return not (self.packages or self.bare_packages)

    @property
    def name(self) -> str:
        """Key in --runtimes, and folder of its environment."""
        return f"{self.family}-{self.version}"


def _onnxruntime(version: str) -> Runtime:
    old = tuple(map(int, version.split("."))) < (1, 19)  # whose wheels were built for numpy 1
    packages = (f"onnxruntime=={version}", "numpy==1.26.4" if old else "numpy==2.2.6")
    settings = ("default", "disabled", "exact")
    return Runtime("onnxruntime", version, "run_onnxruntime.py", packages, settings=settings)


def _openvino(version: str) -> Runtime:
    packages = (f"openvino=={version}", "numpy==2.1.3")
    return Runtime("openvino", version, "run_openvino.py", packages, settings=("default", "f32"))


def _javascript(family: str, version: str) -> Runtime:
    packages, settings = (f"{family}@{version}",), ("default", "disabled")
    return Runtime(family, version, "run_onnxruntime_js.mjs", packages, settings=settings, kind="node")


ONNXRUNTIMES = ("1.16.3", "1.18.1", "1.20.1", "1.23.2", "1.26.0", "1.27.0", "1.29.0", "1.32.0")

RUNTIMES: tuple[Runtime, ...] = (
    *map(_onnxruntime, ONNXRUNTIMES),
    _javascript("onnxruntime-web", "1.20.1"),
    _javascript("onnxruntime-web", "1.30.0"),
    _javascript("onnxruntime-node", "1.20.1"),
    _javascript("onnxruntime-node", "1.30.0"),
    *map(_openvino, ("2024.6.0", "2025.4.1", "2026.4.1")),
    Runtime("tract", "0.23.9", "run_tract.py", ("tract==0.23.9", "numpy==2.2.6")),
    Runtime(
        "iree",
        "3.13.0",
        "run_iree.py",
        ("iree-base-compiler==3.13.0", "iree-base-runtime==3.13.0", "onnx==1.23.2", "numpy==2.2.6"),
    ),
    Runtime("qonnx", "here", "run_qonnx.py", (), formats=("qonnx",)),
    Runtime(
        "finn",
        "1.6.1",
        "run_finn.py",
        (
            "qonnx==1.0.0",
            "onnx==1.21.0",
            "onnxruntime==1.25.1",
            "protobuf==5.29.6",
            "bitstring==4.3.1",
            "numpy==2.4.6",
            "scipy==1.17.1",
            "rich==13.9.4",
        ),
        bare_packages=(
            "finn-plus==1.6.1",
            "lazy-importer==0.1.0",
            "importlib-metadata==10.2.0",
            "zipp==4.1.2",
            "od==2.0.2",
        ),
        settings=("convert", "streamline"),
        formats=("qonnx",),
    ),
    Runtime(
        "hls4ml",
        "1.3.0",
        "run_hls4ml.py",
        (),
        bare_packages=(
            "h5py==3.16.0",
            "hls4ml==1.3.0",
            "ml-dtypes==0.6.0",
            "numpy==2.4.6",
            "onnx==1.23.2",
            "protobuf==7.36.2",
            "pydigitalwavetools==1.1",
            "pyyaml==6.0.4",
            "quantizers==1.2.2",
            "typing-extensions==4.16.0",
        ),
        settings=("io_stream",),
        formats=(FOR_HLS4ML,),
    ),
)


class InstallError(Exception):
    """An environment that cannot be made; the message is the reason in one line."""


@dataclass(frozen=True)
class Row:
    """Result of one file in one runtime.

    Args:
        model, images: label of the network, and number of images.
        agreement: with the folded network; None without logits.
        integer_layers, float_layers: None if the runtime does not report them.
        refused: reason for no logits.
    """

    model: str
    format: str
    family: str
    version: str
    setting: str
    images: int
    agreement: Agreement | None = None
    integer_layers: int | None = None
    float_layers: int | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Case:
    """A network, images (N, C, H, W) float32 in [0, 1] and the folded network's logits (N, K) for them."""

    folded: nn.Module
    spec: ModelSpec
    images: Tensor
    logits: Tensor


# --- environments ----------------------------------------------------------------------------------------------------


def prepare(runtime: Runtime, environments: Path) -> Path:
    """Folder of the runtime's environment, made if it is missing or its pins have changed.

    Raises:
        InstallError: the packages cannot be installed.
    """
    folder = (environments / runtime.name).absolute()
    pins = json.dumps([runtime.packages, runtime.bare_packages])
    stamp = folder / "pins.json"
    if runtime.is_here or (stamp.is_file() and stamp.read_text(encoding="utf-8") == pins):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for command in _install_commands(runtime, folder):
        _install(command, folder)
    stamp.write_text(pins, encoding="utf-8")
    return folder


def _install_commands(runtime: Runtime, folder: Path) -> Iterator[list[str]]:
    if runtime.kind == "node":
        (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        # Install scripts would fetch GPU libraries.
        yield ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", *runtime.packages]
        return
    python = str(_python(folder))
    if shutil.which("uv"):
        yield ["uv", "venv", "--python", sys.executable, "--clear", str(folder)]
        install = ["uv", "pip", "install", "--python", python]
    else:
        yield [sys.executable, "-m", "venv", "--clear", str(folder)]
        install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if runtime.packages:
        yield [*install, *runtime.packages]
    if runtime.bare_packages:
        yield [*install, "--no-deps", *runtime.bare_packages]


def _install(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except FileNotFoundError as error:
        raise InstallError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{command[0]} took longer than {INSTALL_SECONDS} s") from error
    if done.returncode:
        raise InstallError(_last_line(done.stderr) or f"{command[0]}: exit status {done.returncode}")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


# --- runs ------------------------------------------------------------------------------------------------------------


def run(
    runtime: Runtime, environment: Path, setting: str, file: Path, images: Path
) -> tuple[Tensor | None, dict[str, Any]]:
    """Logits (N, K) float32 of the file and the runner's JSON; or None and ``{"refused": reason}``."""
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.npy"
        python = sys.executable if runtime.is_here else str(_python(environment))
        program = "node" if runtime.kind == "node" else python
        command = [program, str(RUNNERS / runtime.runner), str(file), str(images), str(logits), "--setting", setting]
        cwd = Path(folder) if runtime.is_here else environment
        try:
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=RUN_SECONDS)
        except FileNotFoundError:
            return None, {"refused": f"{command[0]} is not installed"}
        except subprocess.TimeoutExpired:
            return None, {"refused": f"took longer than {RUN_SECONDS} s"}
        if done.returncode or not logits.is_file():
            ended = f"ended by signal {-done.returncode}" if done.returncode < 0 else "no reason given"
            return None, {"refused": _last_line(done.stderr) or ended}
        return torch.from_numpy(np.load(logits)), json.loads(done.stdout.strip().splitlines()[-1])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def rows_of(
    case: Case, file: Path | None, reason: str, format_name: str, images: Path, runtimes: Sequence[Any]
) -> Iterator[Row]:
    """One row for every runtime and setting.

    Args:
        file, reason: the .onnx; or None and the reason.
        runtimes: pairs of a :class:`Runtime` and the folder of its environment, or the reason for none.
    """
    for runtime, environment in runtimes:
        if format_name not in runtime.formats:
            continue
        for setting in runtime.settings:
            logits: Tensor | None = None
            report: dict[str, Any] = {"refused": reason}
            if isinstance(environment, str):
                report = {"refused": f"not installed: {environment}"}
            elif file is not None:
                logits, report = run(runtime, environment, setting, file, images)
            yield Row(
                case.spec.label,
                format_name,
                runtime.family,
                report.get("version", runtime.version),
                setting,
                len(case.images),
                None if logits is None else compare(case.logits, logits),
                report.get("integer_layers"),
                report.get("float_layers"),
                report.get("refused"),
            )


# --- networks --------------------------------------------------------------------------------------------------------


def open_case(path: Path, *, data: str | None, images: int, epsilon: float | None) -> Case:
    """The folded network of ``path``, its test images, and as many adversarial ones if ``epsilon`` is given."""
    network, spec, _ = load_model(path)
    pixels, labels = data_for(spec, data, path).test.take(images)
    folded = fold(network, spec)
    x = to_float(pixels)
    if epsilon is not None:
        generators = ImageGenerators.of(0, range(len(x)), attack="pgd")
        found = pgd(folded, x, labels, epsilon=epsilon, steps=20, generator=generators)
        x = torch.cat([x, (found * 255).round() / 255])
    return Case(folded, spec, x, logits_of(folded, x, label="PyTorch"))


def written(case: Case, format_name: str, folder: Path) -> tuple[Path | None, str]:
    """File of the network in a format; or None and the reason."""
    name, _, consumer = format_name.partition(" --for ")
    path = folder / f"{case.spec.label}-{name}{consumer}.onnx"
    try:
        check_format(name, case.spec, consumer=consumer or None)
        onnx.save(build(name, case.folded, case.spec, consumer=consumer or None), path)
    except RobustqError as error:
        return None, f"not exported: {error}"
    return path, ""


# --- the table -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown table: one column per network, rows with equal cells merged, reasons of refusals below."""
    models = list(dict.fromkeys(row.model for row in rows))
    reasons: dict[str, int] = {}
    cells: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.family, row.format, row.version, row.setting), {})[row.model] = _cell(row, reasons)
    by_version: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
    for (family, form, version, setting), found in cells.items():
        key = (family, form, version, tuple(found.get(model, "") for model in models))
        by_version.setdefault(key, []).append(setting)
    merged: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
    for (family, form, version, found_cells), settings in by_version.items():
        merged.setdefault((family, form, ", ".join(settings), found_cells), []).append(version)
    lines = [
        "| runtime | versions | setting | format | " + " | ".join(models) + " |",
        "|---" * (4 + len(models)) + "|",
    ]
    for (family, form, setting, found_cells), versions in merged.items():
        lines.append(f"| {family} | {_spanned(versions, family)} | {setting} | {form} | {' | '.join(found_cells)} |")
    return [*lines, "", *(f"[{number}] {reason}" for reason, number in reasons.items())]


def _spanned(versions: list[str], family: str) -> str:
    """Versions as text; more than two consecutive ones as a range."""
    known = [each.version for each in RUNTIMES if each.family == family]
    indices = [known.index(version) for version in versions if version in known]
    if len(versions) > 2 and indices == list(range(indices[0], indices[0] + len(versions))):
        return f"{versions[0]} to {versions[-1]}"
    return ", ".join(versions)


def _cell(row: Row, reasons: dict[str, int]) -> str:
    if row.agreement is None:
        return f"refused [{reasons.setdefault(str(row.refused), len(reasons) + 1)}]"
    found = row.agreement
    layers = "" if row.integer_layers is None else f"; {row.integer_layers}, {row.float_layers}"
    share = f"{found.max_difference:.0e}" if found.max_difference else "0"
    return f"{found.images - found.different_top1} of {found.images}; {share}{layers}"


def main() -> None:
    """Write, run, compare and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--data", help="default: as the models say")
    parser.add_argument("--images", type=int, default=0, help="test images, evenly spaced; 0: all")
    parser.add_argument("--epsilon", type=_fraction, help="also adversarial images within this radius, such as 8/255")
    parser.add_argument("--formats", nargs="+", default=[*QCDQ_LIKE, "qonnx", FOR_HLS4ML])
    parser.add_argument("--runtimes", nargs="+", help="families or names; default: all")
    parser.add_argument("--environments", type=Path, default=Path("runs/environments"))
    options = parser.parse_args()
    progress.show(True)
    chosen = _chosen(options.runtimes, parser)
    prepared = [(runtime, _prepared(runtime, options.environments)) for runtime in chosen]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in options.model:
            case = open_case(model, data=options.data, images=options.images, epsilon=options.epsilon)
            np.save(folder / "images.npy", case.images.numpy())
            for form in options.formats:
                file, reason = written(case, form, folder)
                for row in rows_of(case, file, reason, form, folder / "images.npy", prepared):
                    print(f"{row.model} {form} {row.family} {row.version} {row.setting}", file=sys.stderr, flush=True)
                    rows.append(row)
    print("\n".join(table(rows)))


def _fraction(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)


def _chosen(names: list[str] | None, parser: argparse.ArgumentParser) -> list[Runtime]:
    known = {each.name for each in RUNTIMES} | {each.family for each in RUNTIMES}
    unknown = set(names or ()) - known
    if unknown:
        parser.error(f"unknown runtime '{min(unknown)}'; known: {', '.join(sorted(known))}")
    return [each for each in RUNTIMES if names is None or each.name in names or each.family in names]


def _prepared(runtime: Runtime, environments: Path) -> Path | str:
    try:
        return prepare(runtime, environments)
    except InstallError as error:
        return str(error)


if __name__ == "__main__":
    main()
