"""Quantizers and layers of quantized networks: widths, scales, backward rules, calibration, folding."""
