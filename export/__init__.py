"""From a trained network to a deployable file, and the proof that the file gives the network's answers."""

import os

# onnxruntime 1.32 queues usage events below ~/.cache as soon as it is imported, unless this is set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
