"""What differs between model families: most is read off a model's modules (`packed.served`), the rest is here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The numbers a prompt must fit, and where a packed pass finds what it needs.

    Attributes:
        layers, kv_heads, head_dim: shape of one layer's keys and values.
        hidden: features of an input embedding.
        width: features of what goes from layer to layer.
        first_position: position number of a segment's first row (XLM-R begins after its padding index).
        positions: rows of the absolute position table that can be used, or None where positions are relative.
        is_causal: rows see no later rows.
        attends: names, within the base model, of the modules that attend, one a layer. A name stands more than once
            where layers share a module.
        sublayers: of a layer, the module that attends, and those whose outputs are what attention and feed-forward part
            add to the residual stream; None: not known.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    width: int
    first_position: int
    positions: int | None
    is_causal: bool
    attends: tuple[str, ...]
    sublayers: tuple[str, str, str] | None

    @property
    def shares_modules(self) -> bool:
        """A module is called for more than one layer (ALBERT), so that none knows which it is."""
        return len(set(self.attends)) != self.layers


# The base model that heads call, where it is not `base_model` itself, by model type.
CALLED = {"opt": "decoder"}

# What `Geometry.sublayers` may be: the first whose modules a layer has.
SUBLAYERS = (
    ("attention", "attention.output.dropout", "output.dropout"),  # BERT's kin
    ("self_attn", "self_attn.o_proj", "mlp"),  # Llama's
    ("self_attn", "self_attn.dense", "mlp"),  # Phi
    ("self_attn", "self_attn.out_proj", "fc2"),  # OPT
    ("attn", "attn.c_proj", "mlp"),  # GPT-2
    ("attention", "attention.dense", "mlp"),  # GPT-NeoX
    ("attention", "attention.out_lin", "ffn"),  # DistilBERT
    ("attn", "attn.Wo", "mlp"),  # ModernBERT
)
