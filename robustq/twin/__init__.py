"""The differentiable twin of an .onnx file: a torch module with the answers of the file and useful gradients."""
