"""A backbone run packed: the tokens of a padded batch as one row of segments, prompts among them."""

from torch import nn

from .backbone import PackedBackbone
from .encoder_decoder import PackedEncoderDecoder
from .inputs import PromptInputs
from .layout import Packing

__all__ = ["PackedBackbone", "PackedEncoderDecoder", "Packing", "PromptInputs", "packed_model"]


def packed_model(model: nn.Module, *, fused: bool = False) -> PackedBackbone | PackedEncoderDecoder:
    """What runs `model` packed; see there.

    Raises:
        TypeError, ValueError: nothing does.
    """
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return (PackedEncoderDecoder if is_encoder_decoder else PackedBackbone)(model, fused=fused)
