"""Other networks for the same task: surrogates for transfer attacks, and the natural control.

Copies of the network at other bit widths cost nothing. Other networks are trained once, by the natural recipe with few
epochs on few images, and kept in ``runs/surrogates``: their accuracy hardly matters, their lack of defence does.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from robustq.checkpoint import load_model, load_weights
from robustq.data import DATASET_NAMES, Dataset, to_float
from robustq.errors import ModelFileError
from robustq.hardening.run_folder import RESULT, RUNS
from robustq.models.fx.factory import plain_name, runs_user_code
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import FLOAT_BITS
from robustq.models.spec import ModelSpec, build_model
from robustq.progress import note, only_notes
from robustq.report.text import duration
from robustq.workflow.open_model import LARGE, OpenedModel, frozen
from robustq.workflow.resume import resume_run
from robustq.workflow.setup import check_fit
from robustq.workflow.train import train_model

SURROGATES = RUNS / "surrogates"
SEED = 1000  # of the trained networks; unlikely to be that of the user's model
EPOCHS, IMAGES = 10, 10_000


@dataclass(frozen=True)
class OtherNetworks:
    """Makes and loads other networks for the task of ``data``, on ``device``, without gradients of weights.

    ``custom_model`` is the custom model whose code may run.
    """

    data: Dataset
    custom_model: str | None
    device: torch.device

    def requantized(self, opened: OpenedModel) -> dict[str, nn.Module]:
        """The network under attack without quantizers, and at 8 bits where it has fewer; with the same weights,
        untrained.

        None of a lone .onnx, of a float network, nor of a binary one, whose weights mean nothing at another width.
        """
        spec = opened.spec
        if opened.network is None or spec.widths.is_float or spec.widths.is_binary:
            return {}
        made: dict[str, nn.Module] = {}
        for name, bits in (("its float twin", FLOAT_BITS), ("its 8-bit twin", 8)):
            if bits == 8 and min(spec.weight_bits, spec.act_bits) >= 8:
                continue
            wanted = replace(spec, weight_bits=bits, act_bits=bits, layer_bits=())
            network = build_model(wanted, custom_model=self.custom_model)
            load_weights(network, opened.network.state_dict(), opened.path)
            if bits == 8:
                images, _ = self.data.train.take(512)
                calibrate(network, to_float(images))
            made[name] = frozen(network, self.device)
        return made

    def load(self, path: Path) -> nn.Module:
        """A network of the user; ModelFileError or DataError if it cannot be read or is for another task."""
        return self._load(path, self.custom_model)

    def of_the_paper(self, spec: ModelSpec) -> dict[str, nn.Module]:
        """Surrogates for the columns "(B)": natural networks of the same and of another architecture.

        The paper does not name its surrogate (arXiv:2210.08701).
        """
        if spec.image_size > LARGE:
            other = "resnet18" if "mobilenet_v2" in spec.architecture else "torchvision:mobilenet_v2"
        else:
            other = "resnet20" if spec.architecture == "resnet8" else "resnet8"
        return self.natural(spec) | self.natural(replace(spec, architecture=other))

    def natural(self, spec: ModelSpec) -> dict[str, nn.Module]:
        """A naturally trained float network of ``spec``'s architecture, by name; trained at its first use."""
        architecture = plain_name(spec.architecture)
        owned = self.custom_model if runs_user_code(spec.architecture) else None
        folder = SURROGATES / _folder_name(spec.architecture, self.data)
        if not (folder / RESULT).is_file():
            note(
                f"control a natural {architecture} is trained once and kept in {folder} "
                "(or give --control FILE, or --no-surrogates)"
            )
            start = time.perf_counter()
            with only_notes("takes"):
                self._train(spec, folder, owned)
            note(f"control trained in {duration(time.perf_counter() - start)}")
        try:
            network = self._load(folder / "best.pt", owned)
        except ModelFileError as error:
            raise ModelFileError(f"{error}; or remove {folder} to train it again") from error
        return {f"a natural {architecture}": network}

    def _load(self, path: Path, custom_model: str | None) -> nn.Module:
        network, spec, _ = load_model(path, custom_model=custom_model)
        check_fit(spec, self.data, path)
        return frozen(network, self.device)

    def _train(self, spec: ModelSpec, folder: Path, custom_model: str | None) -> None:
        if folder.exists():
            resume_run(folder, device=str(self.device), custom_model=custom_model)
            return
        settings = [f"epochs={EPOCHS}", f"train_images={IMAGES if len(self.data.train) > IMAGES else 0}"]
        if self.data.name == "imagenet" or Path(self.data.name).is_dir():
            settings.append(f"image_size={spec.image_size}")
        train_model(
            "natural",
            overrides=tuple(settings),
            data=self.data.name,
            resize=self.data.resize,
            skip_bad_images=self.data.skip_bad_images,
            architecture=None if custom_model else spec.architecture,
            custom_model=custom_model,
            bits=FLOAT_BITS,
            seed=SEED,
            device=str(self.device),
            out=folder,
        )


def _folder_name(architecture: str, data: Dataset) -> str:
    """``digits-0a1b2c3d-resnet8-natural-1000``; the digest distinguishes data of one name."""
    name = data.name if data.name in DATASET_NAMES else Path(data.name).stem
    words = (name, data.digest()[:8], architecture.replace(":", "."), "natural", str(SEED))
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))
