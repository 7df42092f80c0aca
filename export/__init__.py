"""The export stage: a trained network in, a deployable file out, and the proof of what that file does.

lowering/ holds one graph pass a file; formats.py says which format is made of which passes; session.py runs a file in
onnxruntime and reads its optimised graph; parity.py and recheck.py judge; bundle.py is the folder that leaves the
house.
"""

import os

# onnxruntime 1.32 queues usage events below ~/.cache as soon as it is imported, unless this is set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
