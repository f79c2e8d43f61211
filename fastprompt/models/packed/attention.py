"""The attention function that transformers' models call.

Registered as "fastprompt" in both of transformers' interfaces (with the first alone, padding would be ignored). A call
that carries no pass, such as stock training's, goes to transformers' own `sdpa`, or to `eager` where scores are capped.
"""

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .passes import GenerationPass, KeysPass, PackedPass, stock_attention

NAME = "fastprompt"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fastprompt_pass: PackedPass | GenerationPass | KeysPass | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, L, D), key and value (B, Hkv, S, D) -> (B, L, H, D), None."""
    options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    if fastprompt_pass is None:
        return stock_attention(module, query, key, value, attention_mask, **options, **kwargs)
    return fastprompt_pass.attention(module, query, key, value, attention_mask, **options, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
