"""Time of an epoch of ODG-Q: eager, compiled, and with CUDA graphs, on random images in the sizes of CIFAR-10.

    python -m benchmarks.gpu.epoch [--batch 512] [--bits 4] [--kinds eager compiled graphs] [--images 45000]

Each kind first takes three untimed steps, whose time (compilation) is `first`. An epoch has the recipe's augmentation,
all batches and the checks for NaN; the monitor takes no part. `peak` is the memory of torch's tensors on a GPU.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import nn

from benchmarks.output import head, make_parser, row
from benchmarks.training import model_spec, wait
from robustq.data import Augment, TensorSplit
from robustq.hardening.diagnosis import FiniteCheck
from robustq.hardening.methods.method import MethodContext
from robustq.hardening.methods.registry import build_method
from robustq.hardening.metrics import peak_memory, reset_peak_memory
from robustq.hardening.optimization import TrainStep
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import build_model
from robustq.workflow.setup import pick_device, read_recipe

KINDS = {"eager": (), "compiled": ("compile=true",), "graphs": ("compile=true", "cuda_graphs=true")}
WARM_UP = 3


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--images", type=int, default=45_000)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe, such as precision=tf32"
    )
    parser.add_argument("--device")
    options = parser.parse_args()
    device = pick_device(options.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = TensorSplit(images, torch.randint(0, 10, (options.images,), generator=generator))
    print(f"{options.architecture}, {options.bits} bits, batch {options.batch}, {device}, torch {torch.__version__}")
    head("kind", "first (s)", "epoch (s)", "images/s", "peak (MiB)")
    for kind in options.kinds:
        step = _step(options, (*KINDS[kind], *options.set), device)
        start = time.perf_counter()
        _batches(step, split, options.batch, device, most=WARM_UP)
        first = time.perf_counter() - start
        reset_peak_memory(device)
        start = time.perf_counter()
        _batches(step, split, options.batch, device)
        seconds = time.perf_counter() - start
        peak = peak_memory(device)["peak_memory_bytes"] / 2**20
        row(kind, f"{first:.1f}", f"{seconds:.2f}", f"{options.images / seconds:,.0f}", f"{peak:,.0f}")


def _step(options: object, keys: tuple[str, ...], device: torch.device) -> TrainStep:
    values = vars(options)
    batch, bits = values["batch"], values["bits"]
    recipe = read_recipe("odgq", (f"batch_size={batch}", "lr=0.01", *keys))
    spec = replace(model_spec(values["architecture"], bits, 32))
    torch.manual_seed(0)
    model = build_model(spec).to(device)
    calibrate(model, torch.rand(min(batch, 128), 3, 32, 32, device=device), from_scratch=True)
    model = model.to(memory_format=torch.channels_last).train()
    context = MethodContext(
        model=model,
        epsilon=8 / 255,
        batch_size=batch,
        image_shape=(3, 32, 32),
        classes=10,
        samples=values["images"],
        epochs=recipe.epochs,
        device=device,
        generator=torch.Generator().manual_seed(0),
        cross_entropy=nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
    )
    made = TrainStep(model, build_method(recipe, context), recipe)
    made.method.begin_epoch(0)
    return made


def _batches(step: TrainStep, split: TensorSplit, size: int, device: torch.device, *, most: int | None = None) -> None:
    """Train on an epoch, or on its first batches; the device has ended when this returns."""
    check = FiniteCheck(device)
    augment = Augment(crop_padding=4, flip=True)
    for number, batch in enumerate(split.batches(size, device=device, seed=0, augment=augment)):
        if number == most:
            break
        check.add(batch.x, step.step(batch, epoch=0).loss)
    if not check.is_finite(step.model):
        raise SystemExit("loss or weights are NaN")
    wait(device)


if __name__ == "__main__":
    main()
