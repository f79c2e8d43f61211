"""How a prompt begins: its module, and the weight in it."""

import torch
from torch import Tensor

from fastprompt.nn import Prefix, Prompt
from fastprompt.nn.prompts import join_prefix

from .config import PromptConfig
from .packed import PackedBackbone


def new_prompt(config: PromptConfig, packed: PackedBackbone) -> Prompt | Prefix:
    """A prompt as `config` describes it, on the backbone's device, float32 at least: small steps are lost in less."""
    initial, geometry = _initial(config, packed), packed.geometry
    if config.kind == "prompt":
        return Prompt(initial)
    return Prefix(initial, chosen_layers(config, geometry.layers), geometry.kv_heads, geometry.head_dim)


def chosen_layers(config: PromptConfig, count: int) -> list[int]:
    """The layers, ascending and from 0, that a prefix enters in a backbone of `count` layers.

    Raises:
        ValueError: config.layers has none, one twice, or one that is not there.
    """
    if config.layers is None:
        return list(range(count))
    layers = []
    for layer in config.layers:
        if not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"layers must be indices of the backbone's {count} layers, got {layer!r}")
        layers.append(layer % count)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be different and at least one, got {list(config.layers)}")
    return sorted(layers)


@torch.no_grad()
def _initial(config: PromptConfig, packed: PackedBackbone) -> Tensor:
    embedding = packed.base.get_input_embeddings()
    geometry, rows = packed.geometry, config.num_virtual_tokens
    layers = chosen_layers(config, geometry.layers)
    like = embedding.weight
    dtype = torch.promote_types(like.dtype, torch.float32)
    if config.init == "random":
        if config.kind == "prompt":
            scale = float(embedding(torch.arange(min(1024, len(like)), device=like.device)).std())
            columns = geometry.hidden
        else:
            scale, columns = 0.1, len(layers) * 2 * geometry.kv_heads * geometry.head_dim
        scale = scale if config.init_scale is None else config.init_scale
        return torch.randn(rows, columns, dtype=dtype, device=like.device) * scale
    if config.init == "vocabulary":
        ids = torch.randint(len(like), (rows,), device=like.device)
    else:
        ids = torch.as_tensor(list(config.init_ids), device=like.device)
        if ids.min() < 0 or ids.max() >= len(like):
            raise ValueError(f"init_ids must be in [0, {len(like)}), got {ids.min()} to {ids.max()}")
        ids = ids.repeat(-(-rows // len(ids)))[:rows]
    if config.kind == "prompt":
        return embedding(ids).to(dtype)
    from transformers import DynamicCache

    was_training = packed.base.training
    packed.base.eval()
    cache = DynamicCache()  # plain layers: a sliding one would cut the prefix
    packed.base(input_ids=ids.unsqueeze(0), past_key_values=cache)
    packed.base.train(was_training)
    return join_prefix([(cache.layers[i].keys[0], cache.layers[i].values[0]) for i in layers]).to(dtype)
