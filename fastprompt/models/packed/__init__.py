"""A backbone run packed: the tokens of a padded batch as one row of segments, prompts among them."""

from .backbone import PackedBackbone
from .inputs import PromptInputs
from .layout import Packing

__all__ = ["PackedBackbone", "Packing", "PromptInputs"]
