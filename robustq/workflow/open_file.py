"""A lone .onnx, ready to be attacked: onnxruntime as the judge, its twin for gradients where there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robustq.attacks.base import Model
from robustq.data import load_dataset
from robustq.errors import ModelFileError, UsageError
from robustq.export.runtimes.registry import ONNXRUNTIME
from robustq.export.session import load_limited
from robustq.models.quant.quantizers import FLOAT_BITS
from robustq.models.spec import ModelSpec
from robustq.progress import note
from robustq.tables import parse_bounded
from robustq.twin.deployed import TwinOnImages, judge_of
from robustq.twin.graph import Graph, read_graph
from robustq.twin.inputs import SPEC, ImageForm, find_form
from robustq.twin.network import Twin, load_twin
from robustq.twin.registry import DIALECTS


@dataclass(frozen=True)
class LoneFile:
    """An .onnx classifier with nothing beside it.

    Args:
        path: of the file.
        twin: gives the gradients, on the CPU; None where the file has operators that the twin does not.
        judge: onnxruntime, or the twin where onnxruntime cannot run the file.
        in_onnxruntime: whether a runtime judges, and not the twin.
        answers_classes: whether the file answers with classes instead of logits.
        spec: stored in the file, or what file and data tell.
        lack: why there is no twin.
    """

    path: Path
    twin: TwinOnImages | None
    judge: Model
    in_onnxruntime: bool
    answers_classes: bool
    spec: ModelSpec
    lack: str | None = None


def open_lone_file(
    path: Path,
    *,
    data: str | None = None,
    pixels: str | None = None,
    layout: str | None = None,
    resize: str | None = None,
    skip_bad_images: bool = False,
    runtime: str = ONNXRUNTIME,
) -> LoneFile:
    """Open a file. A file whose gradients cannot be computed has no twin.

    Args:
        data: of a file that does not name its data.
        pixels, layout: as :func:`robustq.twin.inputs.find_form`.
        resize, skip_bad_images: of such data, as :func:`robustq.data.load_dataset`.
        runtime: the judge.

    Raises:
        RobustqError: no image classifier, an input form or data that neither file nor option tells, or a file that
            neither the twin nor onnxruntime can run.
    """
    graph = read_graph(path)
    form = find_form(path, graph, pixels=pixels, layout=layout)
    spec = stored_spec(path, graph)
    if spec is None:
        spec = _spec_by_data(path, form, data, resize=resize, skip_bad_images=skip_bad_images)
    black = torch.zeros(1, spec.channels, spec.image_size, spec.image_size)
    named = graph.answers_classes
    try:
        twin = TwinOnImages(Twin(graph).eval(), form)
        with torch.no_grad():
            classes = twin(black).shape[1]
    except ModelFileError as lack:
        known = spec.classes if named else None
        judge = _judge_without_twin(path, form, lack, side=spec.image_size, classes=known, runtime=runtime)
        return LoneFile(path, None, judge, True, named, _completed(spec, graph, judge(black).shape[1]), str(lack))
    spec = _completed(spec, graph, classes, quantized=twin.twin.quantizes)
    if any("Quant" in node.operator and node.operator.startswith(DIALECTS) for node in graph.nodes):
        if runtime != ONNXRUNTIME:
            raise UsageError(f"{path}: holds QONNX, which {runtime} cannot run; export with --format qcdq")
        note("judge   the twin: onnxruntime cannot run QONNX")
        return LoneFile(path, twin, twin, False, False, spec)
    judge = judge_of(path, form, classes=classes if named else None, runtime=runtime)
    return LoneFile(path, twin, judge, True, named, spec)


def twin_of_export(path: Path, spec: ModelSpec, device: torch.device) -> tuple[TwinOnImages | None, list[str]]:
    """The twin of a file that robustq wrote, or None and a note on why it has none."""
    try:
        twin = load_twin(path)
        found = TwinOnImages(twin, find_form(path, twin.graph)).to(device)
        with torch.no_grad():
            found(torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device=device))
    except (ModelFileError, UsageError) as error:
        return None, [f"not attacked through the file alone: {error}"]
    return found, []


def _completed(spec: ModelSpec, graph: Graph, classes: int, *, quantized: bool = False) -> ModelSpec:
    """The spec of a file of another tool with its number of classes; its widths are not known."""
    if SPEC in graph.metadata:
        return spec
    bits = 8 if quantized else FLOAT_BITS
    return replace(spec, classes=classes, weight_bits=bits, act_bits=bits)


def _judge_without_twin(
    path: Path, form: ImageForm, lack: ModelFileError, *, side: int, classes: int | None, runtime: str
) -> Model:
    """The file in a runtime, within the limits of files that robustq writes.

    Raises:
        ModelFileError: ``lack``, and why the runtime cannot run it either.
    """
    try:
        load_limited(path, side=side)
        return judge_of(path, form, classes=classes, runtime=runtime)
    except ModelFileError as refused:
        reason = str(refused).removeprefix(f"{path}: ")
        raise ModelFileError(f"{path}: {lack}; without gradients: {reason}") from refused


def stored_spec(path: Path, graph: Graph) -> ModelSpec | None:
    """The spec in the metadata of a file of robustq; None in a file of another tool."""
    stored = graph.metadata.get(SPEC)
    if stored is None:
        return None
    try:
        return ModelSpec.from_dict(parse_bounded(stored, json.loads))
    except (ValueError, ModelFileError) as error:
        raise ModelFileError(f"{path}: its metadata {SPEC} cannot be read ({error})") from error


def _spec_by_data(
    path: Path, form: ImageForm, data: str | None, *, resize: str | None, skip_bad_images: bool
) -> ModelSpec:
    """What shape and data tell; the classes are those of the data, and every layer counts as float."""
    if data is None:
        raise UsageError(f"{path}: does not name its data; add --data NAME, FOLDER or FILE.npz")
    resized = data == "imagenet" or Path(data).is_dir()
    loaded = load_dataset(
        data, image_size=form.image_size if resized else None, resize=resize, skip_bad_images=skip_bad_images
    )
    channels, side = form.channels or loaded.channels, form.image_size or loaded.image_size
    spec = ModelSpec(path.stem, FLOAT_BITS, FLOAT_BITS, loaded.classes, channels, side, loaded.name, None, ())
    return replace(spec, resize=loaded.resize, skip_bad_images=loaded.skip_bad_images)
