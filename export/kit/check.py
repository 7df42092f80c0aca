"""Check a deployed network on this device: the file, its answers, its accuracy under attack, its cost.

    python3 kit/check.py [FILE.onnx] [--threads 1]

It needs Python 3.8 or newer, numpy and onnxruntime. Without FILE.onnx it takes the one in the folder above. The images
are those of images.npz: clean ones, and adversarial ones that were found on the workstation. Exit status: 0 if the file
is intact and answers as it did there, 1 if not, 2 if the check cannot run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

LARGEST_SHARE = 0.001
"""Share of the answers that may differ from the workstation's: another CPU may round a tie the other way."""


def main() -> int:
    """Run the check and print its result."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="the deployed .onnx; default: that of the folder above")
    parser.add_argument("--threads", type=int, default=1, help="threads of onnxruntime")
    parser.add_argument("--seconds", type=float, default=3.0, help="for which single images are timed")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent
    try:
        facts = json.loads((here / "kit.json").read_text(encoding="utf-8"))
        file = options.file or here.parent / facts["file"]
        changed = [
            path.name
            for path, name in ((file, facts["file"]), (here / "images.npz", "images.npz"))
            if digest(path) != facts["sha256"][name]
        ]
        with np.load(here / "images.npz", allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        session, load_seconds = open_session(file, options.threads)
        answers = {
            kind: classes(session, arrays[kind], integers=facts["input"] == "uint8")
            for kind in ("clean", "adversarial")
        }
        times = latencies(session, arrays["clean"][:1], options.seconds, integers=facts["input"] == "uint8")
    except (OSError, KeyError, ValueError) as error:
        print(f"check.py: cannot run: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # onnxruntime's own exception types share no base below Exception
        print(f"check.py: onnxruntime cannot run {file}: {error}", file=sys.stderr)
        return 2
    clean_right = answers["clean"] == arrays["labels"]
    counts = {
        "clean": (int(clean_right.sum()), facts["clean_right"]),
        "under attack": (
            int((clean_right & (answers["adversarial"] == arrays["labels"])).sum()),
            facts["robust_right"],
        ),
    }
    total = len(arrays["labels"])
    other = sum(int((answers[kind] != arrays[kind + "_answers"]).sum()) for kind in answers)
    print(f"device       {platform.machine()}, onnxruntime {onnxruntime.__version__}, {options.threads} thread(s)")
    print(f"file         {file.name}: " + ("changed: " + ", ".join(changed) if changed else "intact"))
    for name, (here_right, there_right) in counts.items():
        print(f"{name:12s} {here_right} of {total} right ({here_right / total:.1%}); on the workstation {there_right}")
    print(f"answers      {other} of {2 * total} differ from the workstation's")
    print(f"latency      median {1000 * np.median(times):.3g} ms, p99 {1000 * np.percentile(times, 99):.3g} ms")
    print(f"load         {1000 * load_seconds:.3g} ms; peak memory of this process {peak_memory() / 1e6:.0f} MB")
    passed = not changed and other <= LARGEST_SHARE * 2 * total
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest()


def open_session(path: Path, threads: int) -> tuple[onnxruntime.InferenceSession, float]:
    """A session on the CPU, and the seconds that it took to open."""
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
    return session, time.perf_counter() - begin


def logits(session: onnxruntime.InferenceSession, images: np.ndarray, *, integers: bool) -> np.ndarray:
    """uint8 (N, C, H, W) -> (N, K)."""
    values = images if integers else images.astype(np.float32) / np.float32(255)
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: values})[0]
    return found


def classes(session: onnxruntime.InferenceSession, images: np.ndarray, *, integers: bool) -> np.ndarray:
    """uint8 (N, C, H, W) -> (N,) int64."""
    parts = [images[first : first + 50] for first in range(0, len(images), 50)]
    return np.concatenate([logits(session, part, integers=integers).argmax(axis=1) for part in parts])


def latencies(
    session: onnxruntime.InferenceSession, image: np.ndarray, seconds: float, *, integers: bool
) -> list[float]:
    """Seconds of each call with one image, after a first call that does not count."""
    logits(session, image, integers=integers)
    times: list[float] = []
    while not times or sum(times) < seconds:
        begin = time.perf_counter()
        logits(session, image, integers=integers)
        times.append(time.perf_counter() - begin)
    return times


def peak_memory() -> int:
    """Bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main())
