"""export --format safetensors: the weights of a network with its spec, in a file that robustq and others read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robustq.checkpoint import content_of, load_model
from robustq.errors import OutputError, UsageError
from robustq.files import check_output, free_names
from robustq.hardening.run_folder import last_hardened
from robustq.safetensors_file import SUFFIX, write_safetensors
from robustq.seals import sha256
from robustq.workflow import Result
from robustq.workflow.export import EXPORTS
from robustq.zoo import model_path

SAFETENSORS = "safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightsResult(Result):
    """Result of :func:`export_weights`."""

    file: Path
    format: str = SAFETENSORS
    label: str  # of the network, such as ``resnet20-w4a4``
    data: str
    entries: int  # tensors in the file
    size_bytes: int
    sha256: str


def export_weights(
    model: Path | str | None = None, *, custom_model: str | None = None, out: Path | str | None = None
) -> WeightsResult:
    """Write a model file as safetensors: every weight, statistic and scale under its name, and the spec as metadata.

    harden, attack, export and info read the file as they read a model.pt. Other programs find a plain state dict in it;
    the weights are the float ones behind the quantizers.

    Args:
        model: a model file of robustq (best.pt, model.pt) or ``zoo:NAME``; None: the last hardened model.
        custom_model: the ``module:function`` that built the network, if it is a custom model; allows its code to run.
        out: the new file, whose name ends in ``.safetensors``. None: ``export-out/<run>.safetensors``.

    Returns:
        the file, its size in bytes and its SHA-256; its weights were read back and are equal.

    Raises:
        UsageError: ``out`` has another ending, or no model is given and none was hardened.
        OutputExistsError: ``out`` exists.
        ModelFileError: ``model`` is no model file of robustq.
        OutputError: the file could not be read back.
    """
    chosen = last_hardened() if model is None else model_path(model)
    out = None if out is None else Path(out)
    if out is not None and out.suffix != SUFFIX:
        raise UsageError(f"--out {out} does not end in {SUFFIX}; with --format {SAFETENSORS} it is the new file's name")
    check_output(out, EXPORTS)
    network, spec, info = load_model(chosen, custom_model=custom_model)
    state = network.state_dict()
    names = free_names(EXPORTS / chosen.absolute().parent.name, SUFFIX)
    wanted = next(name for name in names if not name.exists()) if out is None else out
    final = write_safetensors(wanted, content_of(state, spec, info=info)).absolute()
    again = load_model(final, custom_model=custom_model)[0].state_dict()
    if not all(torch.equal(value, again[name]) for name, value in state.items()):
        raise OutputError(f"{final}: its weights were not read back as they were written; write it again")
    return WeightsResult(
        file=final,
        label=spec.label,
        data=spec.data,
        entries=len(state),
        size_bytes=final.stat().st_size,
        sha256=sha256(final),
    )
