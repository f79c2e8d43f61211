"""Prompts in transformers' generate for encoder-decoders: the encoder runs packed, prefixes stand in the cache."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from .packed import PackedEncoderDecoder, PromptInputs

_NOT_TAKEN = "encoder_outputs", "past_key_values", "decoder_inputs_embeds", "cache_implementation"


def generate(packed: PackedEncoderDecoder, prompt_inputs: PromptInputs, inputs: dict):
    """What the model's own `generate(**inputs)` gives with those prompts, of a model that is in evaluation mode.

    Raises:
        ValueError, IndexError: prompts that do not fit, or an argument that has no place here.
    """
    for name in _NOT_TAKEN:
        if inputs.get(name) is not None:
            raise ValueError(f"{name} must not be given to generate with a prompt")
    if inputs.get("use_cache") is False:
        raise ValueError("use_cache must not be False: the prefix stands in the cache")
    texts = {name: inputs.pop(name, None) for name in ("input_ids", "inputs_embeds", "attention_mask")}
    main = inputs.pop("inputs", None)  # another name that generate has for input_ids
    texts["input_ids"] = main if texts["input_ids"] is None else texts["input_ids"]
    states, mask = packed.encoded(texts, prompt_inputs)
    prefix, index = packed.decoder_prefix(prompt_inputs), None
    if 0 < len(prefix) < len(packed.layers):
        raise ValueError(
            f"generate needs a prefix in all {len(packed.layers)} layers of the decoder or in none, got {list(prefix)}"
        )
    if prompt_inputs.index is not None:
        index = torch.tensor(prompt_inputs.index, device=states.device)
    hooks = _hooks(packed, prefix, index, prompt_inputs.position_offset) if prefix else []
    try:
        # What transformers compiles it keeps, for calls without these hooks as well.
        own = {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask, "disable_compile": True}
        return packed.model.generate(**inputs | own)
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(packed: PackedEncoderDecoder, prefix: dict, index: Tensor | None, offset: int) -> list:
    """Those that put a prefix into the decoder's cache before its first pass, and see to masks and positions."""
    length = prefix[0][0].shape[2]

    def enter(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache, mask = kwargs["past_key_values"].self_attention_cache, kwargs.get("attention_mask")
        given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        if cache.get_seq_length() == 0:
            for layer, pair in prefix.items():
                cache.update(*(_of_batch(x, index, len(given)).to(packed.model.dtype) for x in pair), layer)
        if mask is not None and mask.ndim == 2:
            kwargs = kwargs | {"attention_mask": torch.cat([mask.new_ones(len(mask), length), mask], 1)}
        return args, kwargs

    def shift(table: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": kwargs["position_ids"] - length + offset}
        ids, embeds, past = args  # of M2M100
        return (ids, embeds, past - length + offset), kwargs

    hooks = [packed.decoder.module.register_forward_pre_hook(enter, with_kwargs=True)]
    if packed.decoder.positions is not None and offset != length:
        hooks.append(packed.decoder.positions.register_forward_pre_hook(shift, with_kwargs=True))
    return hooks


def _of_batch(bank: Tensor, index: Tensor | None, samples: int) -> Tensor:
    """(N, H, P, D) -> (B, H, P, D): beams, which are neighbours, are of one sample."""
    if index is None:
        return bank[:1].expand(samples, -1, -1, -1)
    return bank[index.repeat_interleave(samples // len(index))]
