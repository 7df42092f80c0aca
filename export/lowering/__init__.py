"""Passes on ONNX graphs: each changes a ModelProto in place, keeps its answers, and returns how often it fired."""
