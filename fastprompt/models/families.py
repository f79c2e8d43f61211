"""What differs between the model families that fastprompt packs."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Geometry:
    """The numbers a prompt must fit.

    Attributes:
        layers, kv_heads, head_dim: shape of one layer's keys and values.
        hidden: features of an input embedding.
        first_position: position number of a segment's first row (XLM-R begins after its padding index).
        positions: rows of the absolute position table that can be used, or None where positions are relative.
        is_causal: rows see no later rows.
        sublayers: of a layer, the module that attends, and those whose outputs are what attention and feed-forward part
            add to the residual stream.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    first_position: int
    positions: int | None
    is_causal: bool
    sublayers: tuple[str, str, str]


ENCODERS, DECODERS = ("bert", "xlm-roberta"), ("llama", "gemma3_text")
_IN_ENCODERS = "attention", "attention.output.dropout", "output.dropout"
_IN_DECODERS = "self_attn", "self_attn.o_proj", "mlp"


def geometry(backbone: nn.Module) -> Geometry:
    """Read the geometry off a transformers model.

    Raises:
        TypeError: `backbone` is no transformers model.
        ValueError: of a family, or of a variety of it, that is not supported.
    """
    config = getattr(backbone, "config", None)
    family = getattr(config, "model_type", None)
    if family is None:
        raise TypeError(f"backbone must be a transformers model, got {type(backbone).__name__}")
    if family not in ENCODERS + DECODERS:
        raise ValueError(f"backbone must be of a family in {ENCODERS + DECODERS}, got {family!r}")
    if family in ENCODERS and (config.is_decoder or getattr(config, "add_cross_attention", False)):
        raise ValueError(f"backbone of family {family!r} must be an encoder, got is_decoder or add_cross_attention set")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"backbone of family {family!r} must be causal, got use_bidirectional_attention set")
    heads = config.num_attention_heads
    first_position = config.pad_token_id + 1 if family == "xlm-roberta" else 0
    return Geometry(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        first_position=first_position,
        positions=config.max_position_embeddings - first_position if family in ENCODERS else None,
        is_causal=family in DECODERS,
        sublayers=_IN_ENCODERS if family in ENCODERS else _IN_DECODERS,
    )
