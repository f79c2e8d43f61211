"""How a prompt begins: its module, and the weight in it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.nn import LSTMEncoder, MLPEncoder, Prefix, PrefixEncoder, Prompt
from fastprompt.nn.prompts import join_prefix

from .config import PromptConfig
from .families import Geometry
from .packed import PackedBackbone, PackedEncoderDecoder
from .packed.passes import KeysPass
from .packed.weights import device_of


def new_prompt(config: PromptConfig, packed: PackedBackbone | PackedEncoderDecoder) -> Prompt | Prefix:
    """A prompt as `config` describes it, on the backbone's device, float32 at least: small steps are lost in less."""
    geometry, dropout = packed.geometry, config.dropout
    initial = _initial(config, packed)
    encoder = _encoder(config, packed)
    if encoder is not None:
        encoder.to(initial)
    if config.kind == "prompt":
        return Prompt(initial, encoder, dropout)
    layers = chosen_layers(config, geometry.layers, geometry.encoder_layers)
    sources = (
        range(geometry.layers + geometry.encoder_layers)
        if geometry.reads is None
        else [source for source, *_ in geometry.reads]
    )
    for layer in layers if config.layers is not None else ():
        if sources[layer] != layer:
            raise ValueError(f"layers must have keys of their own, got {layer}, which reads those of {sources[layer]}")
    return Prefix(initial, layers, geometry.kv_heads, geometry.head_dim, encoder, dropout)


def chosen_layers(config: PromptConfig, count: int, beyond: int = 0) -> list[int]:
    """The layers, ascending and from 0, that a prefix enters in a backbone of `count` layers.

    Of an encoder-decoder these are the decoder's; those `beyond` them, the encoder's, get one only if they are named.

    Raises:
        ValueError: config.layers has none, one twice, or one that is not there.
    """
    if config.layers is None:
        return list(range(count))
    layers = []
    for layer in config.layers:
        if not isinstance(layer, int) or not -count <= layer < count + beyond:
            raise ValueError(f"layers must be indices of the backbone's {count + beyond} layers, got {layer!r}")
        layers.append(layer + count if layer < 0 else layer)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be different and at least one, got {list(config.layers)}")
    return sorted(layers)


def _encoder(config: PromptConfig, packed: PackedBackbone | PackedEncoderDecoder) -> nn.Module | None:
    if config.encoder is None:
        return None
    width, columns = _widths(config, packed)
    hidden_size = config.encoder_hidden_size or width
    if config.kind == "prefix":
        return PrefixEncoder(width, hidden_size, columns)
    return (MLPEncoder if config.encoder == "mlp" else LSTMEncoder)(width, hidden_size)


def _widths(config: PromptConfig, packed: PackedBackbone | PackedEncoderDecoder) -> tuple[int, int]:
    """Features of a row that an encoder takes, and of a row of the prompt."""
    geometry = packed.geometry
    if config.kind == "prompt":
        return geometry.hidden, geometry.hidden
    width = geometry.kv_heads * geometry.head_dim
    return width, len(chosen_layers(config, geometry.layers, geometry.encoder_layers)) * 2 * width


@torch.no_grad()
def _initial(config: PromptConfig, packed: PackedBackbone | PackedEncoderDecoder) -> Tensor:
    embedding = packed.base.get_input_embeddings()
    rows, device, vocabulary = config.num_virtual_tokens, device_of(embedding), embedding.num_embeddings
    dtype = torch.promote_types(embedding.weight.dtype, torch.float32)
    if config.init == "random":
        width, columns = _widths(config, packed)
        if config.encoder is not None:
            scale, columns = 1.0, width
        elif config.kind == "prompt":
            scale = float(embedding(torch.arange(min(1024, vocabulary), device=device)).std())
        else:
            scale = 0.1
        scale = scale if config.init_scale is None else config.init_scale
        return torch.randn(rows, columns, dtype=dtype, device=device) * scale
    if config.init == "vocabulary":
        ids = torch.randint(vocabulary, (rows,), device=device)
    else:
        ids = torch.as_tensor(list(config.init_ids), device=device)
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(f"init_ids must be in [0, {vocabulary}), got {ids.min()} to {ids.max()}")
        ids = ids.repeat(-(-rows // len(ids)))[:rows]
    if config.kind == "prompt":
        return embedding(ids).to(dtype)
    if isinstance(packed, PackedEncoderDecoder):
        raise ValueError(f"init of a prefix must be 'random' in an encoder-decoder, got {config.init!r}")
    was_training, own = packed.base.training, KeysPass()
    packed.base.eval()
    packed.base(input_ids=ids.unsqueeze(0), fastprompt_pass=own)
    packed.base.train(was_training)
    layers = [own.found[i] for i in chosen_layers(config, packed.geometry.layers)]
    return join_prefix([tuple(_widened(x[0], packed.geometry) for x in layer) for layer in layers]).to(dtype)


def _widened(rows: Tensor, geometry: Geometry) -> Tensor:
    """Keys (Hkv, P, D) of a narrower layer, with zeros that it does not read."""
    heads, _, features = rows.shape
    return F.pad(rows, (0, geometry.head_dim - features, 0, 0, 0, geometry.kv_heads - heads))
