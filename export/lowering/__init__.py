"""Graph passes on standard ONNX, one a file: each takes a ModelProto, changes it in place, keeps every answer, and says
how often it fired.
"""
