"""onnxruntime's JavaScript packages in Node.js: a child process that gets batches of images over a pipe.

The protocol stands in ``node_judge.mjs``. Node.js looks for the package in ``node_modules`` of the working folder and
of the folders above it, and in the folders of the environment variable NODE_PATH.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import struct
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustq.errors import ModelFileError
from robustq.export.runtimes.engine import Opening

SCRIPT = Path(__file__).with_name("node_judge.mjs")

LONGEST_ANSWER = 600.0
"""Seconds for one batch."""

KINDS = {"float32": 0, "uint8": 1}
"""Type of the images -> its number in the protocol."""

_VERSION = """
const name = process.argv[1], {createRequire} = require("module"), path = require("path"), fs = require("fs");
let place = path.dirname(createRequire(path.join(process.cwd(), "package.json")).resolve(name));
for (; place !== path.dirname(place); place = path.dirname(place)) {
  const file = path.join(place, "package.json");
  if (fs.existsSync(file)) {
    const found = JSON.parse(fs.readFileSync(file, "utf8"));
    if (found.name === name) { console.log(found.version); break; }
  }
}
"""


class NodeJudge:
    """See :class:`.engine.Engine`; ``package`` is ``onnxruntime-web`` or ``onnxruntime-node``."""

    def __init__(self, package: str, opening: Opening) -> None:
        program = shutil.which("node")
        if program is None:
            raise ModelFileError("Node.js is not installed")
        words = [program, str(SCRIPT), package, str(Path.cwd()), str(opening.path.absolute()), str(opening.threads)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0
        )
        try:
            hello = json.loads(self._read(*struct.unpack("<I", self._read(4))))
        except BaseException:
            self.close()
            raise
        if "error" in hello:
            self.close()
            raise ModelFileError(str(hello["error"]))
        self.version = str(hello["version"])

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """See the protocol."""
        head = [KINDS[str(images.dtype)], images.ndim, *images.shape]
        try:
            self._write(np.array(head, dtype="<u4").tobytes() + images.tobytes())
        except BrokenPipeError as error:
            raise self._ended() from error
        (status,) = struct.unpack("<I", self._read(4))
        (count,) = struct.unpack("<I", self._read(4))
        if status == 2:
            raise ModelFileError(self._read(count).decode("utf-8", "replace"))
        shape = struct.unpack(f"<{count}I", self._read(4 * count))
        kind = np.dtype("<f4" if status == 0 else "<i8")
        return np.frombuffer(self._read(kind.itemsize * int(np.prod(shape))), kind).reshape(shape).copy()

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __del__(self) -> None:
        errors = getattr(self, "_errors", None)  # none where Node.js is missing
        if errors is not None and not errors.closed:
            self.close()

    def _write(self, content: bytes) -> None:
        assert self._process.stdin is not None  # for mypy: it was asked for as a pipe
        view = memoryview(content)
        while view:
            view = view[self._process.stdin.write(view) :]

    def _read(self, count: int) -> bytes:
        """Exactly ``count`` bytes. ModelFileError if the process ended or is silent for :data:`LONGEST_ANSWER`."""
        assert self._process.stdout is not None  # for mypy: it was asked for as a pipe
        parts, missing, end = [], count, time.monotonic() + LONGEST_ANSWER
        while missing:
            ready, _, _ = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0.0))
            if not ready:
                self._process.kill()
                raise ModelFileError(f"not done after {LONGEST_ANSWER:.0f} s")
            part = self._process.stdout.read(missing)
            if not part:
                raise self._ended()
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _ended(self) -> ModelFileError:
        """The last words of a process that has ended."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read()[-2000:].decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {status}")
        return ModelFileError(f"Node.js ended: {last}")


@cache
def _version_of(package: str, folder: str, node_path: str) -> str | None:
    program = shutil.which("node")
    if program is None:
        return None
    done = subprocess.run([program, "-e", _VERSION, package], capture_output=True, text=True, check=False, cwd=folder)
    return done.stdout.strip() or None


def version_of(package: str) -> str | None:
    """Version of the installed package; None without Node.js or without the package."""
    return _version_of(package, str(Path.cwd()), os.environ.get("NODE_PATH", ""))
