"""Networks, their quantizers and weights: bit widths in, Brevitas layers out."""

from robustq.models.light_brevitas import import_brevitas

import_brevitas()
