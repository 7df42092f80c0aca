"""harden: from a trained network, recipe and data to a run folder with best.pt."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from robustq.errors import UsageError
from robustq.files import check_output, optional_path
from robustq.hardening.run_folder import RUNS, check_new_run
from robustq.models.fx.factory import is_custom
from robustq.models.spec import ModelSpec
from robustq.progress import note
from robustq.recipe import parse_epsilon
from robustq.workflow.export_check import check_export, check_file_size
from robustq.workflow.float_check import count_float_network, note_normalisation
from robustq.workflow.job import Job, TrainResult
from robustq.workflow.module_file import check_same_answers, weights_file
from robustq.workflow.quantize import quantize, quantize_only
from robustq.workflow.setup import Source, data_for, open_source, pick_device, read_recipe, with_normalisation
from robustq.workflow.teacher import with_absolute_teacher
from robustq.workflow.train import chosen_architecture, training_epsilon
from robustq.workflow.training_run import check_job, run_recipe
from robustq.workflow.widths import WidthOptions
from robustq.zoo import model_path


def harden_model(
    model: Path | str | nn.Module,
    *,
    bits: int | None = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    bits_per_layer: Path | str | None = None,
    normalisation: str | None = None,
    recipe: str = "odgq",
    overrides: tuple[str, ...] = (),
    data: str | None = None,
    architecture: str | None = None,
    custom_model: str | None = None,
    feature_layer: str | None = None,
    epsilon: float | str | None = None,
    weights: str | None = None,
    trust_pickle: bool = False,
    resize: str | None = None,
    skip_bad_images: bool = False,
    checks: bool = True,
    seed: int = 0,
    device: str | None = None,
    out: Path | str | None = None,
) -> TrainResult:
    """Quantize a trained network, fine-tune it by a recipe (default: ODG-Q), and count its accuracy.

    Args:
        model: the network: path of a model file of robustq or of a checkpoint of another program (.pt, .safetensors;
            then ``data`` is needed), ``zoo:NAME``, or a torch.nn.Module, whose weights are copied (then ``data`` is
            needed, and ``custom_model`` or ``architecture`` unless it is one of robustq's networks).
        bits: width of weights and activations in bits: 8, 4, 3, 2, 1, or 32 for float; None: the recipe's, else the
            model's.
        weight_bits, act_bits: widths of weights and of activations in bits; override ``bits``.
        bits_per_layer: path of a TOML file of widths of single layers, layer name -> bits.
        normalisation: ``"imagenet"`` or ``"MEAN/STD"`` (in units of pixel / 255) with which weights of another program
            were trained; becomes the first layer of the network. None: none; model files of robustq contain theirs.
        recipe: name of a recipe (``robustq recipes``) or path of a .toml file.
        overrides: texts ``key=value`` that override keys of the recipe, such as ``"epochs=10"``.
        data: data set: a known name (``"cifar10"``), a folder of images or an .npz file; None: the model's.
        architecture: of a checkpoint whose names do not tell it: ``torchvision:NAME``, ``timm:NAME`` or
            a known name.
        custom_model: ``module:function`` that builds the network, if it is a custom model; its code is run.
        feature_layer: name of the layer whose inputs ODG-Q aligns; None: the model's, else the last global pooling.
        epsilon: radius of the threat model in units of pixel / 255: a number in [0, 1] or a text such as ``"8/255"``;
            None: the recipe's, else the model's, else 8/255.
        weights: key of the weights in a checkpoint that holds several, such as ``"state_dict_ema"``; None: the usual
            one; a note names the others.
        trust_pickle: also load a ``torch.save(model)`` file, which can run any code.
        resize: how images of a folder become square: ``"short-side"``, ``"short-side:PIXELS"`` or ``"squash"``; None:
            as for the model, else ``"short-side"``.
        skip_bad_images: leave out image files that cannot be read, with a warning; kept in the model.
        checks: refuse weights of another program that answer near chance, or far below the accuracy that their file
            states, and a custom network that cannot be exported.
        seed: of order, augmentation and the method's draws.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"``; None: a GPU if there is one.
        out: path of the new run folder; None: ``runs/<network>-<method>``, numbered if it exists.

    Returns:
        accuracies as fractions with 95% intervals, ``bits``, ``method``, and the paths of the run folder and of its
        best.pt (``result["checkpoint"]``).

    Raises:
        ModelFileError: the file cannot be read, or its weights do not fit the network.
        UsageError: an unknown architecture, width or device, a value that is missing, a network that cannot be
            quantized or exported, or weights near chance.
        RecipeError: an unknown recipe or key, or a value out of range.
        DataError: data that are missing, broken or unfit for the model.
        OutputExistsError: ``out`` exists.
        OutOfMemoryError: a batch does not fit; one that does is named.
        NotFiniteError: NaN or Inf in training; saved states are kept.
        RunStoppedError: stopped by Ctrl-C; the command that resumes the run is named.
    """
    settings, out = with_absolute_teacher(read_recipe(recipe, overrides)), optional_path(out)
    if epsilon is not None:
        settings = replace(settings, epsilon=parse_epsilon(epsilon))
    place = pick_device(device)
    if out is not None:
        check_new_run(out)
    check_output(out, RUNS)
    options = WidthOptions(bits=bits, weight_bits=weight_bits, act_bits=act_bits, bits_per_layer=bits_per_layer)
    options.check()
    wanted_data = data or settings.data
    chosen = chosen_architecture(architecture, custom_model)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            path = stack.enter_context(weights_file(model, architecture=chosen))
        else:
            path = model_path(model)
        opened = open_source(
            path,
            wanted_data,
            image_size=settings.image_size or None,
            train_images=settings.train_images,
            architecture=chosen,
            custom_model=custom_model,
            weights=weights,
            trust_pickle=trust_pickle,
            resize=resize,
            skip_bad_images=skip_bad_images,
        )
        source = with_normalisation(opened.spec, normalisation, path)
        if opened.is_foreign and normalisation is None:
            note_normalisation(source.architecture)
        widths, layer_bits = options.resolve(settings, source=source)
        loaded = opened.data or data_for(
            source,
            wanted_data,
            path,
            train_images=settings.train_images,
            resize=resize,
            skip_bad_images=skip_bad_images,
        )
        if isinstance(model, nn.Module):
            check_same_answers(model, opened.state, source, loaded, custom_model=custom_model)
        if not settings.trains and widths.is_float:
            raise UsageError(f"recipe {recipe} at 32 bits leaves nothing to quantize; add --bits 4 (or 8, 3, 2)")
        if settings.trains and widths.is_float and not source.widths.is_float:
            note("bits    32: the quantizers are dropped and the float weights behind them are trained")
        shared = settings.shared_sum_scale
        spec = replace(
            source,
            weight_bits=widths.weight_bits,
            act_bits=widths.act_bits,
            data=loaded.name,
            epsilon=training_epsilon(settings, source.epsilon),
            class_names=loaded.class_names,
            layer_bits=layer_bits,
            feature_layer=feature_layer or source.feature_layer,
            shared_sum_scale=source.shared_sum_scale if shared is None else shared,
            resize=loaded.resize or source.resize,
            skip_bad_images=loaded.skip_bad_images,
        )
        job = Job(
            spec=spec,
            data=loaded,
            recipe=settings,
            seed=seed,
            device=place,
            out=out,
            source=path,
            foreign=opened.is_foreign,
        )
        return _run(opened, source, job, custom_model=custom_model, checks=checks)


def _run(opened: Source, source: ModelSpec, job: Job, *, custom_model: str | None, checks: bool) -> TrainResult:
    """Quantize the weights of ``opened``, whose network is ``source``, check both networks, and run the recipe."""
    assert job.source is not None
    torch.manual_seed(job.seed)
    if checks and is_custom(job.spec.architecture):
        check_file_size(opened.state)
    network = quantize(opened.state, source, job, path=job.source, custom_model=custom_model)
    if job.recipe.trains:
        check_job(network, job)  # before the float network is counted
    if checks and source.widths.is_float:
        with torch.random.fork_rng(
            devices=[] if job.device.type == "cpu" else [job.device]
        ):  # the training draws what it would draw without this
            counted = count_float_network(
                opened.state,
                source,
                job.data,
                network=opened.network if source == opened.spec else None,
                path=job.source,
                custom_model=custom_model,
                device=job.device,
                is_foreign=opened.is_foreign,
                stated=opened.stated,
            )
        job = replace(job, float_accuracy=counted)
    if checks and is_custom(job.spec.architecture):
        check_export(network, job.spec, job.data)
    return run_recipe(network, job) if job.recipe.trains else quantize_only(network, job)
