"""What differs between model families: most is read off a model's modules (`packed.served`), the rest is here."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The numbers a prompt must fit, and where a packed pass finds what it needs.

    Attributes:
        layers, kv_heads, head_dim: shape of one layer's keys and values, the widest where they differ.
        hidden: features of an input embedding.
        width: features of what goes from layer to layer.
        first_position: position number of a segment's first row (XLM-R begins after its padding index).
        positions: rows of the absolute position table that can be used, or None where positions are relative.
        is_causal: rows see no later rows.
        attends: names, within the base model, of the modules that attend, one a layer. A name stands more than once
            where layers share a module.
        sublayers: of a layer, the module that attends, and those whose outputs are what attention and feed-forward part
            add to the residual stream; None: not known.
        encoder_layers: of an encoder-decoder, whose decoder the rest is about, the encoder's layers that a prefix may
            enter, counted after the decoder's.
        reads: of each layer, the layer whose keys and values it reads (Gemma 3n and 4: late layers read those of an
            early one), and their heads and features; None: each its own, all of one shape.
        per_layer: tokens are looked up once more, for what enters in each layer (Gemma 3n and 4).
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
    encoder_layers: int = 0
    reads: tuple[tuple[int, int, int], ...] | None = None
    per_layer: bool = False

    def spread(self, prefix: dict[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
        """What the layers read of a prefix, keys and values (N, kv_heads, P, head_dim) each.

        A layer reads that of the layer whose keys it reads; a narrower one its first heads and features, as in PEFT.
        """
        if self.reads is None:
            return prefix
        return {
            layer: tuple(x[:, :heads, :, :features] for x in prefix[source])
            for layer, (source, heads, features) in enumerate(self.reads)
            if source in prefix
        }

    @property
    def shares_modules(self) -> bool:
        """A module is called for more than one layer (ALBERT), so that none knows which it is."""
        return len(set(self.attends)) != self.layers


# The base model that heads call, where it is not `base_model` itself, by model type.
CALLED = {"opt": "decoder"}

# Encoder-decoders that are served, with their language-model heads: by `packed.encoder_decoder`.
ENCODER_DECODERS = "t5", "mt5", "umt5", "bart", "mbart", "m2m_100"

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
