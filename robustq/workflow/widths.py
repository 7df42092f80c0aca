"""Bit widths of the options of train and harden."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustq.errors import UsageError
from robustq.models.mixed_widths import read_layer_bits
from robustq.models.quant.quantizers import FLOAT_BITS, Widths
from robustq.models.spec import ModelSpec
from robustq.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class WidthOptions:
    """Bit widths of the options; None: as in the recipe or model."""

    bits: int | None = None  # of weights and activations
    weight_bits: int | None = None  # overrides ``bits``, as the next
    act_bits: int | None = None
    bits_per_layer: Path | str | None = None  # TOML file, layer name -> bits

    def check(self) -> None:
        """UsageError for an unknown width, or float weights with quantized activations or the reverse."""
        given = [one for one in (self.bits, self.weight_bits, self.act_bits) if one is not None]
        for one in given:
            Widths(one, one)
        if self.bits is not None or (self.weight_bits is not None and self.act_bits is not None):
            Widths(self.weight_bits or self.bits or 0, self.act_bits or self.bits or 0)

    def resolve(self, recipe: Recipe, *, source: ModelSpec | None) -> tuple[Widths, tuple[tuple[str, int], ...]]:
        """The widths of the network and of single layers: option, else recipe, else source.

        ``source`` is the network to quantize; a quantized one also gives the widths of its single layers. None: trained
        from scratch, float by default.

        Raises:
            UsageError: no width is given, or the file of single layers cannot be used.
        """
        own = None if source is None or source.widths.is_float else source
        layer_bits = () if self.bits_per_layer is None else tuple(read_layer_bits(Path(self.bits_per_layer)).items())
        weight_bits = self.weight_bits or self.bits or recipe.weight_bits
        act_bits = self.act_bits or self.bits or recipe.act_bits
        if weight_bits is None and act_bits is None and own is not None:
            return own.widths, layer_bits or own.layer_bits
        if own is not None:
            weight_bits, act_bits = weight_bits or own.weight_bits, act_bits or own.act_bits
        if self.weight_bits is None and self.act_bits is None:  # a recipe may set one width for both
            weight_bits, act_bits = weight_bits or act_bits, act_bits or weight_bits
        if weight_bits is None and act_bits is None:
            if source is None:
                return Widths(FLOAT_BITS, FLOAT_BITS), layer_bits
            raise UsageError("the model is float and no bit width is given; add --bits 4 (or 8, 3, 2, 1)")
        for wanted, other, option in ((weight_bits, act_bits, "--weight-bits"), (act_bits, weight_bits, "--act-bits")):
            if wanted is None:
                raise UsageError(f"only one bit width of weights and activations is given ({other}); add {option}")
        assert weight_bits is not None and act_bits is not None
        return Widths(weight_bits, act_bits), layer_bits
