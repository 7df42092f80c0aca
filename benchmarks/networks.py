"""Networks of torchvision and timm from a float model to a checked integer file: docs/results/networks.md.

    python -m benchmarks.networks [--out FOLDER] [--networks torchvision:resnet18 ...] [--bits 8 4] [--again]

Each network runs in a process of its own, forked after the imports, with a limit of time and memory: random weights
from a seed, ``harden`` by the recipe ``natural`` for two steps at each width, and ``export --format integer`` with
parity on 120 images, by the functions of those commands. The last layer alone is fitted to made-up images. Rows are
kept in FOLDER/networks.json after each network, and only missing ones are run. Prints the table. ``--table`` prints it
from the rows that are there.

A row exits with 0 where every layer is right (docs/formats.md, "What is checked"): its values agree with the network's
on the file's own inputs, but for rounding ties, which may change any number of answers here.

The networks are all of torchvision's classifiers, and the fifty of timm with the fewest parameters, of each family (a
module of timm.models) at most two, without timm's own test networks (``test_...``); ``--choose`` counts them anew in
minutes. Images have 64 pixels; where a network has a least or a fixed size by its library's own data, that one. The
seconds of a row are the processor's, imports included and the making of weights left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.output import head, make_parser, row

SIDE, CLASSES, STEPS = 64, 10, 2
IMAGES = {"train": 80, "test": 120}
KEPT = "networks.json"

TIMM = tuple(  # one text, so that the formatter keeps the lines
    """
    lcnet_035 mobilenetv2_035 starnet_s050 mobilenetv3_small_050 mobilenetv2_050 dla46x_c starnet_s100
    mobilevit_xxs repghostnet_050 dla46_c mobilevitv2_050 edgenext_xx_small repghostnet_058 ghostnet_050
    ese_vovnet19b_slim_dw convnext_zepto_rms convnext_zepto_rms_ols ghostnetv3_050 efficientvit_b0
    edgenext_x_small efficientvit_m0 regnetx_002 cspnext_tiny iformer_t fasternet_t0 ese_vovnet19b_slim
    cs3darknet_focus_s cs3darknet_s efficientvit_m1 regnety_002 lcnetv2_small xcit_nano_12_p8_224
    xcit_nano_12_p8_384 swiftformer_xs inception_next_atto efficientformerv2_s0 fastvit_t8 pvt_v2_b0 rexnet_100
    mobileone_s1 rexnetr_100 hardcorenas_b hgnetv2_b0 hardcorenas_a mobileone_s0 hgnetv2_b1 cspnext_s
    pit_ti_224 pit_ti_distilled_224 repvit_m1
    """.split()  # noqa: SIM905
)
"""Chosen by the rule above from timm 1.0.31, by parameters with ten classes."""


def main() -> None:
    """Run the missing rows and print all."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="default: docs/results")
    parser.add_argument("--networks", nargs="+", help="default: all")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--again", action="store_true", help="run rows anew that are there")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds a network")
    parser.add_argument("--memory", type=float, default=14.0, help="GiB a network")
    parser.add_argument("--choose", action="store_true", help="print the names of timm's fifty and end")
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there and end")
    options = parser.parse_args()
    if options.choose:
        print(*smallest_of_timm())
        return
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / KEPT
    rows: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name in [] if options.table else options.networks or all_networks():
        missing = [bits for bits in options.bits if options.again or f"{name} {bits}" not in rows]
        if not missing:
            continue
        for bits, found in watched(name, missing, options).items():
            rows[f"{name} {bits}"] = found
            print(f"{name} {bits}: {json.dumps(found)[:300]}", file=sys.stderr, flush=True)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(found)}" for key, found in rows.items())
        kept.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print_table(rows, options.bits)


def all_networks() -> list[str]:
    """Every network, those of few parameters first."""
    from torchvision import models

    sizes = {
        f"torchvision:{name}": models.get_model_weights(name).DEFAULT.meta["num_params"]
        for name in models.list_models(module=models)
    }
    timm = [f"timm:{name}" for name in TIMM]
    small = sorted((name for name in sizes if sizes[name] < 30e6), key=lambda name: sizes[name])
    return [*timm, *small, *sorted(sizes.keys() - set(small), key=lambda name: sizes[name])]


def smallest_of_timm(count: int = 50, of_a_family: int = 2) -> list[str]:
    """Names by the rule of the module's docstring."""
    import timm
    import torch

    found = []
    for name in timm.list_models(exclude_filters="test_*"):
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=CLASSES)
        parameters = sum(one.numel() for one in network.parameters())
        found.append((parameters, name, timm.models.model_entrypoint(name).__module__))
    families: Counter[str] = Counter()
    chosen = []
    for _, name, family in sorted(found):
        families[family] += 1
        if families[family] <= of_a_family:
            chosen.append(name)
    return chosen[:count]


def watched(name: str, widths: list[int], options: Any) -> dict[int, dict[str, Any]]:
    """The rows of a network, by width, from a process that is killed over the limits."""
    imported = import_all()
    folder = options.out / name.replace(":", "-")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.mkdir(parents=True)
    start, peak, ended = time.monotonic(), 0.0, ""
    process = os.fork()
    if process == 0:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        one_network(name, widths, folder, imported)
        os._exit(0)
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        peak = max(peak, _resident(process))
        if time.monotonic() - start > options.limit:
            ended = f"over the limit of {options.limit:.0f} s"
        elif peak > options.memory:
            ended = f"over the limit of {options.memory:g} GiB of memory"
        if ended:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            break
        time.sleep(0.2)
    rows = {}
    for bits in widths:
        path = folder / f"{bits}.json"
        if path.is_file():
            rows[bits] = json.loads(path.read_text(encoding="utf-8"))
        else:
            rows[bits] = {"exit": None, "message": ended or "the process ended by itself"}
        rows[bits]["peak_gib"] = round(peak, 1)
    if all(one["exit"] in (0, 1, 2) for one in rows.values()):
        shutil.rmtree(folder)
    else:  # the log tells more
        for left in [one for one in folder.iterdir() if one.name != "log"]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return rows


@cache
def import_all() -> float:
    """Import all that the commands import; the processor's seconds for it, which each command would need."""
    import timm
    import torch
    import torchvision.models

    import robustq.workflow.export
    import robustq.workflow.train

    assert all((timm, torchvision.models, robustq.workflow.export, robustq.workflow.train))
    torch.set_num_threads(1)
    return time.process_time()


def _resident(process: int) -> float:
    """GiB of memory in use."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def one_network(name: str, widths: list[int], folder: Path, imported: float) -> None:
    """Write FOLDER/BITS.json for each width; ``imported`` are the seconds of the imports, for those of a refusal."""
    from robustq.errors import RobustqError

    warnings.simplefilter("ignore")
    facts: dict[str, Any] = {}
    data = ""
    for bits in widths:
        start, found = time.process_time(), dict(facts)
        try:
            if not facts:
                facts, data = prepare(name, folder)
                found = dict(facts)
                start = time.process_time()
            # The checks before training meet the same graph at each width: once is enough.
            found |= harden_and_export(folder / "float.pt", data, bits, folder / f"w{bits}", checks=bits == widths[0])
        except RobustqError as error:
            found |= {"exit": 2, "message": str(error)}
        except Exception as error:  # what the command line ends with 70
            traceback.print_exc()
            found |= {"exit": 70, "message": f"{type(error).__name__}: {error}"[:300]}
        found["seconds"] = round(time.process_time() - start + imported, 1)
        (folder / f"{bits}.json").write_text(json.dumps(found), encoding="utf-8")


def harden_and_export(model: Path, data: str, bits: int, work: Path, *, checks: bool) -> dict[str, Any]:
    """What ``robustq harden`` and ``robustq export --no-recheck`` do, and what came of it."""
    from robustq.workflow.export import export_model
    from robustq.workflow.harden import harden_model

    batch = 8
    settings = {"train_images": STEPS * batch, "batch_size": batch, "epochs": 1, "warmup_epochs": 0, "lr": 1e-4}
    settings |= {"calibration_images": 2 * batch, "monitor_images": batch}
    overrides = tuple(f"{key}={value}" for key, value in settings.items())
    run = harden_model(
        model, bits=bits, recipe="natural", overrides=overrides, data=data, checks=checks, out=work / "run"
    )
    # Answers of random weights are close calls, which rounding ties and rounded biases may change at any number.
    made = export_model(run["checkpoint"], images=0, recheck=False, max_drift=1.0, out=work / "export")
    shortfalls = made["shortfalls"]
    return {
        "exit": 1 if shortfalls else 0,
        "message": "; ".join(shortfalls),
        "parity": {
            run: {key: one[key] for key in ("images", "different_top1", "max_difference", "same_answers")}
            for run, one in made["parity"].items()
        },
        "on_ties": made.record.get("on_ties", []),
        "accuracy": run["clean_accuracy"],
        "integer_layers": len(made["integer_layers"]),
        "float_layers": Counter(_kind_of(layer) for layer in made["float_layers"]),
        "bytes": made["size_bytes"],
    }


def _kind_of(layer: str) -> str:
    """``HardSigmoid`` of ``/features/HardSigmoid_3`` and of ``HardSigmoid(_token_154)``."""
    return re.sub(r"(_\d+)?(\(.*\))?$", "", layer.rpartition("/")[2])


def prepare(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Write a float model file and images; return facts of the network, and the path of the data.

    The images of a class are one pattern under noise. The statistics of BatchNorm are those of the training images, and
    the last layer is fitted to their classes by least squares: the answers of random weights are close calls, which one
    rounding tie would change.
    """
    import numpy as np
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from robustq.checkpoint import save_model
    from robustq.models.spec import ModelSpec, build_model

    side = side_of(name)
    draws = torch.Generator().manual_seed(0)
    patterns = _noise(CLASSES, side, draws)
    arrays: dict[str, Any] = {}
    for part, count in IMAGES.items():
        labels = torch.arange(count) % CLASSES
        images = 0.9 * patterns[labels] + 0.1 * _noise(count, side, draws)
        arrays[f"x_{part}"] = (images * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        arrays[f"y_{part}"] = labels.numpy()
    data = folder / "data.npz"
    np.savez(data, **arrays)
    spec = ModelSpec(name, 32, 32, CLASSES, 3, side, str(data.resolve()), None, tuple(map(str, range(CLASSES))))
    torch.manual_seed(0)
    network = build_model(spec)
    x = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2) / 255
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    with torch.no_grad():
        for few in torch.split(x[:32], 16) if norms else ():
            network(few)
        _fit_last_layers(network.eval(), x, torch.from_numpy(arrays["y_train"]))
    save_model(folder / "float.pt", network, spec)
    parameters = sum(one.numel() for one in network.parameters())
    return {"parameters": parameters, "side": side}, str(data)


def _noise(count: int, side: int, draws: Any) -> Any:
    """(count, 3, side, side) in [0, 1]: noise of four resolutions."""
    import torch
    from torch.nn import functional

    scales = [torch.rand(count, 3, size, size, generator=draws) for size in (2, 5, 16, side)]
    return torch.stack([functional.interpolate(one, (side, side)) for one in scales]).mean(dim=0)


def _fit_last_layers(network: Any, x: Any, labels: Any) -> None:
    """Set every layer with as many outputs as classes to the least squares from its inputs to the classes."""
    import torch
    from torch import nn

    inputs: dict[Any, list[Any]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda layer, args: inputs.setdefault(layer, []).append(args[0]))
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == CLASSES
    ]
    for few in torch.split(x, 8):
        network(few)
    for hook in hooks:
        hook.remove()
    for layer, parts in inputs.items():
        features = torch.cat(parts).flatten(2).mean(dim=2) if parts[0].dim() > 2 else torch.cat(parts)
        if len(features) != len(x) or features.shape[1] * CLASSES != layer.weight.numel():
            continue
        center = features.mean(dim=0) * (layer.bias is not None)
        centered = (features - center).double()
        kernel = centered @ centered.T
        kernel += 0.01 * kernel.diagonal().mean() * torch.eye(len(kernel))
        targets = torch.eye(CLASSES, dtype=torch.float64)[labels]
        weight = (torch.linalg.solve(kernel, targets).T @ centered).float()
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(1 / CLASSES - weight @ center)


def side_of(name: str) -> int:
    """64, or the side that the network's library gives as its least or only one."""
    library, _, plain = name.partition(":")
    if library == "torchvision":
        from torchvision import models

        least = models.get_model_weights(plain).DEFAULT.meta["min_size"][0]
        return int(max(SIDE, least))
    import timm

    published: Any = timm.get_pretrained_cfg(plain)
    if published.fixed_input_size:
        return int(published.input_size[1])
    return max(SIDE, (published.min_input_size or (0, 0, 0))[1])


def print_table(rows: dict[str, Any], widths: list[int]) -> None:
    """The table of docs/results/networks.md, and its sums."""
    head("network", "parameters", "pixels", "bits", "answers equal", "largest difference", "float layers", "bytes")
    for key, found in rows.items():
        name, bits = key.split()
        if int(bits) not in widths:
            continue
        size = f"{found.get('parameters', 0) / 1e6:.1f} M" if found.get("parameters") else ""
        cells = [f"`{name}`", size, found.get("side", ""), bits]
        if "parity" in found:
            runs = found["parity"].values()
            equal = min(one["images"] - one["different_top1"] for one in runs)
            cells += [f"{equal} of {next(iter(runs))['images']}", f"{max(one['max_difference'] for one in runs):.0e}"]
            kinds = Counter(found["float_layers"])
            shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
            cells += [f"{kinds.total()}{': ' + shown if shown else ''}", f"{found['bytes']:,}"]
            cells[4] += " (ties)" if found["on_ties"] else ""
            if found["exit"]:
                cells[4] += f", exit 1: {found['message'][:160]}"
        else:
            cells += [
                f"exit {found['exit']} after {found.get('seconds', 0):.0f} s: {found['message'][:200]}",
                "",
                "",
                "",
            ]
        row(*cells)
    exits = Counter(found["exit"] for found in rows.values())
    networks = {key.split()[0] for key in rows}
    whole = [one for one in networks if all(rows.get(f"{one} {bits}", {}).get("exit") == 0 for bits in widths)]
    print(f"\n{len(whole)} of {len(networks)} networks export with parity at every width; rows by exit: {dict(exits)}")
    passed = [found for found in rows.values() if found["exit"] == 0]
    beyond = sum(not all(map(_within_default, found["parity"].values())) for found in passed)
    print(f"By default {beyond} of the {len(passed)} rows with exit 0 would exit with 1: ties change too many answers.")


def _within_default(run: dict[str, Any]) -> bool:
    """Whether the answers of a run are the same, but for as many as ties may change by default."""
    from robustq.evaluation.accuracy import wilson_interval
    from robustq.export.parity import MAX_DRIFT

    return run["same_answers"] or wilson_interval(run["different_top1"], run["images"])[0] <= MAX_DRIFT


if __name__ == "__main__":
    main()
