"""Cost of a training step: plain torch and robustq's trainer at several widths, in turns in one run.

    python -m benchmarks.training [--architecture resnet20] [--bits 4] [--batch 128] [--rounds 5] [--steps 3] [--memory]

After `--warm-up` steps, every round times the same number of steps of each kind on the same random images. Printed: the
median step of each kind, and medians over rounds of the ratio within one round.

`plain` is the float network in a loop as in torch's examples; all others take steps of the trainer. Words of a kind:

    float, binary       32 bits, 1 bit; otherwise --bits
    odgq                ODG-Q; otherwise natural training
    bf16, tf32          precision = "bfloat16", "tf32"
    side, integer       side_precision = "bfloat16", "integer"
    compiled, graphs    compile = true, with cuda_graphs = true: a minute or more for the first step

On a GPU `plain` uses TF32 in convolutions, torch's default; `natural` does not. MALLOC_TRIM_THRESHOLD_=131072 in the
environment turns off that freed memory is kept.

``--memory`` instead prints the increase of peak memory of each kind, in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from robustq.cli.process import prepare

prepare()  # before torch is loaded, as in the program

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks.output import make_parser, ratio  # noqa: E402
from robustq.data import Batch  # noqa: E402
from robustq.hardening.methods.method import MethodContext  # noqa: E402
from robustq.hardening.methods.registry import build_method  # noqa: E402
from robustq.hardening.metrics import peak_memory, reset_peak_memory  # noqa: E402
from robustq.hardening.optimization import TrainStep  # noqa: E402
from robustq.models.quant.calibration import calibrate  # noqa: E402
from robustq.models.spec import ModelSpec, build_model  # noqa: E402
from robustq.recipe import load_recipe  # noqa: E402
from robustq.recipe.schema import BFLOAT16, FLOAT32, INTEGER, TF32  # noqa: E402

Step = Callable[[], object]

KINDS = (
    *("plain", "float", "natural", "odgq", "side-odgq", "integer-odgq", "binary", "binary-odgq"),
    *("bf16", "bf16-odgq", "bf16-binary"),
    *("compiled", "compiled-odgq", "compiled-side-odgq", "compiled-integer-odgq", "compiled-binary"),
    *("compiled-binary-odgq", "compiled-integer-binary-odgq"),
    *("compiled-bf16", "compiled-bf16-odgq", "compiled-bf16-binary"),
)
ON_GPU = ("tf32", "tf32-odgq", "graphs", "graphs-odgq", "graphs-tf32", "graphs-tf32-odgq")

RATIOS = (
    ("float", "plain"),
    ("natural", "float"),
    ("odgq", "plain"),
    ("binary-odgq", "binary"),
    ("side-odgq", "odgq"),
    ("integer-odgq", "odgq"),
    *((kind, "plain") for kind in (*KINDS, *ON_GPU) if kind not in ("plain", "float") and "odgq" not in kind),
    *((kind, "natural") for kind in (*KINDS, *ON_GPU) if "odgq" in kind and "binary" not in kind),
    *((way, "natural") for way in ("bf16", "tf32", "compiled", "compiled-bf16", "graphs", "graphs-tf32")),
    *((f"{way}-odgq", way) for way in ("bf16", "tf32", "compiled", "compiled-bf16", "graphs", "graphs-tf32")),
    ("compiled-side-odgq", "compiled"),
    ("compiled-integer-odgq", "compiled"),
    ("compiled-binary-odgq", "compiled-binary"),
    ("compiled-integer-binary-odgq", "compiled-binary"),
    ("compiled-odgq", "odgq"),
    ("compiled-binary", "binary"),
)


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--bits", type=int, default=4, help="except float and binary kinds")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--kinds", nargs="+", choices=KINDS + ON_GPU)
    parser.add_argument("--warm-up", type=int, default=10, help="untimed steps of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    # On a GPU `integer` would be float32.
    options.kinds = options.kinds or [kind for kind in KINDS + ON_GPU * on_gpu if not (on_gpu and "integer" in kind)]
    print(
        f"{options.architecture}, {options.bits} bits, batch {options.batch}, {options.size} pixels, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        flush=True,
    )
    if options.memory:
        _print_memory(options)
    else:
        _print_times(options)


def _print_times(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    kinds = {kind: step_of(kind, options, device) for kind in options.kinds}
    # Allocations and kernel choices of the first steps belong to no kind (see benchmarks.first_step).
    for _ in range(options.warm_up):
        for step in kinds.values():
            step()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, step in kinds.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            wait(device)
            seconds[kind].append((time.perf_counter() - start) / options.steps)
    for kind, values in seconds.items():
        median = statistics.median(values)
        print(f"{kind:22s}{median * 1000:8.1f} ms a step, {options.batch / median:8,.0f} images/s")
    for above, below in RATIOS:
        if above in seconds and below in seconds:
            print(f"{above} / {below} = {ratio(seconds[above], seconds[below])}")


def _print_memory(options: argparse.Namespace) -> None:
    if len(options.kinds) == 1:
        device = torch.device(options.device)
        step = step_of(options.kinds[0], options, device)
        reset_peak_memory(device)
        before = peak_memory(device)["peak_memory_bytes"]
        for _ in range(options.steps):
            step()
        print(f"{options.kinds[0]:12s}{(peak_memory(device)['peak_memory_bytes'] - before) / 2**20:8.0f} MiB")
        return
    found = {}
    for kind in options.kinds:
        command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--kinds", kind]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        print(answer, flush=True)
        found[kind] = float(answer.split()[1])
    for above, below in RATIOS:
        if above in found and below in found:
            print(f"{above} / {below} = {found[above] / found[below]:.2f}")


def step_of(kind: str, options: argparse.Namespace, device: torch.device) -> Step:
    """A function that takes one training step of a kind on random images."""
    torch.manual_seed(0)
    shape = (options.batch, 3, options.size, options.size)
    x = torch.randint(0, 256, shape, device=device).float() / 255.0
    y = torch.randint(0, 10, (options.batch,), device=device)
    if kind == "plain":
        return _plain_step(model_spec(options.architecture, 32, options.size), x, y)
    words = kind.split("-")
    bits = 32 if "float" in words else 1 if "binary" in words else options.bits
    precision = BFLOAT16 if "bf16" in words else TF32 if "tf32" in words else FLOAT32
    keys = [f"precision={precision}"]
    if "side" in words or "integer" in words:
        keys += [f"side_precision={BFLOAT16 if 'side' in words else INTEGER}"]
    if "compiled" in words or "graphs" in words:
        keys += ["compile=true", f"cuda_graphs={str('graphs' in words).lower()}"]
    method = "odgq" if "odgq" in words else "natural"
    return _trainer_step(method, model_spec(options.architecture, bits, options.size), x, y, keys=keys)


def _plain_step(spec: ModelSpec, x: torch.Tensor, y: torch.Tensor) -> Step:
    model = build_model(spec).to(x.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _trainer_step(name: str, spec: ModelSpec, x: torch.Tensor, y: torch.Tensor, *, keys: list[str]) -> Step:
    recipe = load_recipe(name, (f"batch_size={len(x)}", "lr=0.01", *keys))
    model = build_model(spec).to(x.device)
    calibrate(model, x, from_scratch=True)
    model = model.to(memory_format=torch.channels_last).train()
    context = MethodContext(
        model=model,
        epsilon=8 / 255,
        batch_size=len(x),
        image_shape=(3, x.shape[2], x.shape[3]),
        classes=spec.classes,
        samples=len(x),
        epochs=recipe.epochs,
        device=x.device,
        generator=torch.Generator().manual_seed(0),
        cross_entropy=nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
    )
    method = build_method(recipe, context)
    descent = TrainStep(model, method, recipe)
    batch = Batch(x, y, torch.arange(len(x), device=x.device))
    return lambda: [descent.step(batch, epoch=0) for _ in range(method.repeats)]


def model_spec(architecture: str, bits: int, size: int) -> ModelSpec:
    """Spec of a network for ten classes of RGB images."""
    return ModelSpec(architecture, bits, bits, 10, 3, size, "cifar10", None, ())


def wait(device: torch.device) -> None:
    """Synchronize with a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
