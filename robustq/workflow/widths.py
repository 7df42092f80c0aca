"""Which bit widths a job was asked for: options over the recipe over what the model has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustq.errors import UsageError
from robustq.models.mixed_widths import read_layer_bits
from robustq.models.quantizers import FLOAT_BITS, Widths
from robustq.models.spec import ModelSpec
from robustq.recipe import Recipe

LayerBits = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class WidthOptions:
    """What the user asked for; None leaves it to the recipe and the model.

    Args:
        bits: of weights and activations.
        weight_bits, act_bits: of one of them, over ``bits``.
        bits_per_layer: TOML file of layer names and widths.
    """

    bits: int | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    bits_per_layer: Path | None = None

    def check(self) -> None:
        """Refuse widths outside the table before anything is read.

        Raises:
            UsageError: a width that no network can have, or float beside another width.
        """
        given = [one for one in (self.bits, self.weight_bits, self.act_bits) if one is not None]
        for one in given:
            Widths(one, one)
        if self.bits is not None or (self.weight_bits is not None and self.act_bits is not None):
            Widths(self.weight_bits or self.bits or 0, self.act_bits or self.bits or 0)

    def resolve(self, recipe: Recipe, *, source: ModelSpec | None) -> tuple[Widths, LayerBits]:
        """The network's widths and those of single layers.

        Args:
            recipe: its widths count where no option is given.
            source: what is quantized; a float one has no say. A quantized one's single layers keep their widths when
                nothing is asked for. None: the network is trained from scratch, in float unless told otherwise.

        Raises:
            UsageError: nothing says the widths, or the file of single layers is no good.
        """
        own = None if source is None or source.widths.is_float else source
        layer_bits = () if self.bits_per_layer is None else tuple(read_layer_bits(self.bits_per_layer).items())
        weight_bits = self.weight_bits or self.bits or recipe.weight_bits
        act_bits = self.act_bits or self.bits or recipe.act_bits
        if weight_bits is None and act_bits is None and own is not None:
            return own.widths, layer_bits or own.layer_bits
        if own is not None:
            weight_bits, act_bits = weight_bits or own.weight_bits, act_bits or own.act_bits
        if self.weight_bits is None and self.act_bits is None:  # a recipe may name one width for both
            weight_bits, act_bits = weight_bits or act_bits, act_bits or weight_bits
        if weight_bits is None and act_bits is None:
            if source is None:
                return Widths(FLOAT_BITS, FLOAT_BITS), layer_bits
            raise UsageError(
                "the model is float and nothing says how many bits it shall have; add --bits 4 (or 8, 3, 2, 1)"
            )
        for wanted, other, option in ((weight_bits, act_bits, "--weight-bits"), (act_bits, weight_bits, "--act-bits")):
            if wanted is None:
                raise UsageError(f"only one of weights and activations has a width ({other} bits); add {option}")
        assert weight_bits is not None and act_bits is not None
        return Widths(weight_bits, act_bits), layer_bits
