"""A torch.nn.Module of the caller where a job takes a file: its weights in a temporary one, its answers compared."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from robustq.checkpoint import describe_state_dict, load_weights
from robustq.data import Dataset, to_float
from robustq.errors import ModelFileError, UsageError, one_line
from robustq.evaluation.accuracy import all_logits
from robustq.models.spec import ModelSpec, build_model
from robustq.models.state_dict import with_names_of, with_usual_names

IMAGES = 8
"""Training images on which the two networks are compared."""

TOLERANCE = 1e-4
"""Share of the logit range. Other memory layouts change the order of float sums; another forward changes far more."""


@contextmanager
def weights_file(module: nn.Module, *, architecture: str | None) -> Iterator[Path]:
    """Yield a file with the state dict of ``module``, which exists within the block.

    Raises:
        UsageError: the module has names of no known architecture, and ``architecture`` is None.
    """
    name, state = type(module).__name__, {key: value.detach().cpu() for key, value in module.state_dict().items()}
    if architecture is None:
        try:
            describe_state_dict(with_usual_names(state), Path(name))
        except ModelFileError as error:
            raise UsageError(
                f"{name}: is none of robustq's networks, and a hardened file must name the code that builds it; add "
                "custom_model='module:function' (a function that returns this network) or "
                "architecture='torchvision:NAME'"
            ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.pt"
        torch.save(state, path)
        yield path


def check_same_answers(
    module: nn.Module, state: dict[str, Tensor], spec: ModelSpec, data: Dataset, *, custom_model: str | None
) -> None:
    """Compare ``module`` with the float network of ``spec`` that is hardened in its place, on training images.

    UsageError where their logits differ: the builder makes another network of the same weights.
    """
    network = build_model(spec, custom_model=custom_model)
    load_weights(network, with_names_of(network, state), Path(type(module).__name__))
    x = to_float(data.train.take(min(IMAGES, len(data.train)))[0])
    given = x
    if spec.normalisation is not None:
        mean, std = (torch.tensor(row).reshape(-1, 1, 1) for row in spec.normalisation)
        given = (x - mean) / std
    first = next(module.parameters(), x)
    before = module.training
    try:
        answers = all_logits(module.eval(), given.to(first.device, first.dtype), batch_size=IMAGES).float()
    except UsageError:
        raise
    except Exception as error:  # the caller's own code may raise anything
        raise UsageError(f"{type(module).__name__}: cannot take the images: {one_line(error, longest=160)}") from error
    finally:
        module.train(before)
    ours = all_logits(network, x, batch_size=IMAGES)
    span = float(ours.max() - ours.min())
    if answers.shape != ours.shape or float((answers - ours).abs().max()) > TOLERANCE * max(span, 1e-6):
        raise UsageError(
            f"{type(module).__name__}: answers otherwise than {spec.architecture} with its weights; name the function "
            "that builds this network, and the normalisation of its input if it expects one"
        )
