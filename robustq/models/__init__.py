"""Networks, their quantizers and weights: bit widths in, Brevitas layers out."""
