"""Runtimes that can judge a file beside onnxruntime's Python package; :mod:`.registry` lists them."""
