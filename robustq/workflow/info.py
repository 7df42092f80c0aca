"""info: the content of a model file, an ONNX file, an export folder or a run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from robustq.checkpoint import describe_state_dict, load_model
from robustq.errors import ModelFileError
from robustq.export.bundle import RECORD, open_bundle
from robustq.export.description import describe_onnx
from robustq.files import check_model_file
from robustq.hardening.run_config import CONFIG
from robustq.hardening.run_folder import RESULT
from robustq.models.preprocessing import preprocessing_of
from robustq.models.quant.quantizers import FLOAT_BITS
from robustq.models.spec import ModelSpec
from robustq.models.state_dict import (
    count_parameters,
    count_weights,
    describe_layers,
    find_state_dicts,
    with_usual_names,
)
from robustq.safetensors_file import read_metadata
from robustq.seals import sha256
from robustq.tables import misfit, read_table
from robustq.torch_file import read_checkpoint
from robustq.twin.graph import read_graph
from robustq.twin.inputs import stated_form
from robustq.twin.network import without_operator
from robustq.workflow import Result
from robustq.workflow.float_check import stated_accuracy
from robustq.workflow.open_file import stored_spec
from robustq.zoo import model_path

_SHAPES: dict[str, Any] = {
    CONFIG: {"recipe?": {"name?": str, "method?": str}},
    RESULT: {
        **dict.fromkeys(("clean_accuracy?", "holdout_clean_accuracy?", "holdout_pgd10_accuracy?"), int | float),
        "shortfalls?": [str],
    },
}
"""Entries that the report of a run folder needs, in the form of :func:`robustq.tables.misfit`."""

_NUMBER = int | float
_QUICKSTART: dict[str, Any] = {
    "rows": [
        {
            "model": str,
            **dict.fromkeys(("clean", "fgsm", "pgd20", "margin_pgd40", "worst_case", "size_bytes"), _NUMBER),
            "worst_case_interval": (_NUMBER, _NUMBER),
        }
    ],
    "test_images": int,
    "epsilon": _NUMBER,
    "seconds": _NUMBER,
    "folder": str,
    "shortfalls": [str],
}
"""Entries of the result of quickstart that its table needs."""


@dataclass(frozen=True, eq=False)
class FileDescription(Result):
    """Description of a file or folder."""

    FLAT = ("content",)

    path: Path
    kind: str  # ``model``, ``state dict``, ``onnx``, ``export folder``, ``run folder`` or ``quickstart``
    content: dict[str, Any]  # ``architecture data epsilon weight_bits act_bits parameters layers info sha256`` ...


def describe_file(path: Path | str, *, custom_model: str | None = None) -> FileDescription:
    """Describe the file or folder at ``path``; runs no code but that of ``custom_model``.

    Args:
        path: a .pt or .safetensors, an .onnx, an export folder, a run folder, the folder of quickstart, or
            ``zoo:NAME``.
        custom_model: ``module:function`` that built the network, if it is a custom model; its code is run.

    Returns:
        ``kind``, and what that kind of file holds: network, layers, preprocessing, accuracies, sizes, SHA-256.

    Raises:
        ModelFileError: nothing there, or nothing that robustq knows.
    """
    path = model_path(path)
    return FileDescription(path.absolute(), *_describe(path, custom_model))


def _describe(path: Path, custom_model: str | None) -> tuple[str, dict[str, Any]]:
    """Kind and content."""
    if path.is_dir():
        if (path / CONFIG).exists():
            return "run folder", _run(path, custom_model)
        if (path / RESULT).exists() and not any(path.glob("*.onnx")):
            return "quickstart", _quickstart(path)
        bundle = open_bundle(path)
        about: dict[str, Any] = {"file_failures": bundle.failures, "onnx": describe_onnx(bundle.onnx)}
        about["sizes"] = _sizes(path, *bundle.record["sha256"])
        if bundle.model is None:
            layers = about["onnx"]["layers"]
            return "export folder", {**bundle.record, **_stored_spec(bundle.onnx), "layers": layers, **about}
        network, spec, _ = load_model(bundle.model, custom_model=custom_model)
        record = {"data": spec.data, **bundle.record}
        kept: dict[str, Any] = {key: record[key] for key in ("data", "preprocessing") if key in record}
        return "export folder", {**record, **_network(network, spec), **kept, **about}
    check_model_file(path)
    size = {"size_bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".onnx":
        return "onnx", {**size, **describe_onnx(path), **_as_classifier(path)}
    content = read_checkpoint(path)
    if not find_state_dicts(content):
        return "model", {**size, **_model(path, custom_model)}
    return "state dict", {**size, **_state_dict(content, path)}


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    """The set of weights that harden takes, and what else a checkpoint of another program says."""
    sets, metadata = find_state_dicts(content), read_metadata(path)
    state = with_usual_names(next(iter(sets.values())))
    try:
        architecture, classes, channels = describe_state_dict(state, path)
        found: dict[str, Any] = {"architecture": architecture, "classes": classes, "channels": channels}
    except ModelFileError:  # of another architecture, which --arch or --model names
        found = {"architecture": None}
    kinds = {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
    return {
        **found,
        "parameters": count_weights(state),
        "weight_bits": FLOAT_BITS,
        "act_bits": FLOAT_BITS,
        "dtypes": sorted(kinds),
        "weights": [key for key in sets if key],
        "stated_accuracy": stated_accuracy(content, metadata),
        "metadata": metadata,
    }


def _sizes(folder: Path, *names: str) -> dict[str, int]:
    """Bytes of the files that are there."""
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _quickstart(path: Path) -> dict[str, Any]:
    """The result of quickstart, and the kind of each folder in it."""
    content = read_table(path / RESULT, error=ModelFileError)
    wrong = misfit(content, _QUICKSTART)
    if wrong is not None:
        raise ModelFileError(
            f"{path / RESULT}: {wrong} is missing or has another form; give a run folder, an export folder or the "
            "folder of robustq quickstart"
        )
    inner = {one.name: one for one in sorted(path.iterdir()) if one.is_dir()}
    runs = [name for name, folder in inner.items() if (folder / CONFIG).is_file()]
    return {**content, "runs": runs, "exports": [name for name in inner if (inner[name] / RECORD).is_file()]}


def _stored_spec(path: Path) -> dict[str, Any]:
    """The spec in the metadata of a file whose model.pt is not there."""
    spec = stored_spec(path, read_graph(path))
    return {"without_model": True} | ({} if spec is None else json.loads(json.dumps(spec.to_dict())))


def _as_classifier(path: Path) -> dict[str, Any]:
    """How an .onnx file takes images, and which of its operators have no gradient; or why it is no classifier."""
    try:
        graph = read_graph(path)
    except ModelFileError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return {"images": None, "answers": None, "no_gradient": None, "no_classifier": reason}
    stated = stated_form(graph)
    images = {"layout": stated.layout, "pixels": stated.pixels, "found_in": stated.source or None}
    lacking = sorted({node.operator for node in without_operator(graph.nodes)})
    answers = "classes" if graph.answers_classes else "logits"
    return {"images": images, "answers": answers, "no_gradient": lacking, "no_classifier": None}


def _model(path: Path, custom_model: str | None) -> dict[str, Any]:
    network, spec, info = load_model(path, custom_model=custom_model)
    return {**_network(network, spec), "info": {key: value for key, value in info.items() if _is_plain(value)}}


def _network(network: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    return {
        "label": spec.label,
        **json.loads(json.dumps(spec.to_dict())),  # lists instead of tuples, as --json prints
        "preprocessing": preprocessing_of(spec),
        "parameters": count_parameters(network),
        "layers": [layer.to_dict() for layer in describe_layers(network)],
    }


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _run(path: Path, custom_model: str | None) -> dict[str, Any]:
    config, result = (_read_json(path / name) for name in (CONFIG, RESULT))
    found: dict[str, Any] = {"finished": result is not None, "config": config, "result": result}
    checkpoint = path / "best.pt"
    if checkpoint.is_file():
        found = {**_model(checkpoint, custom_model), **found, "sha256": {"best.pt": sha256(checkpoint)}}
        found["sizes"] = _sizes(path, "best.pt")
    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = read_table(path, error=ModelFileError)
    wrong = misfit(content, _SHAPES[path.name])
    if wrong is not None:
        raise ModelFileError(f"{path}: {wrong} is missing or has another form; give a run folder of robustq")
    return content
