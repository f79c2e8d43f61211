"""Prompts in transformers' generate: every layer reads them in place, beside a cache that holds the text alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import seq2seq_generation
from .packed import PackedBackbone, PackedEncoderDecoder, PromptInputs, packed_model
from .packed.forward import padding_of
from .packed.passes import GenerationPass, KeysPass

_TEXTS = ("input_ids", "inputs_embeds", "inputs")  # arguments of generate that tell how many texts there are


@torch.no_grad()
def generate(backbone: nn.Module, prompt_inputs: PromptInputs, /, **inputs):
    """What `backbone.generate(**inputs)` gives with a prompt before each text.

    It runs in evaluation mode, whatever the modules' mode, and leaves them in theirs.

    Args:
        backbone: a causal or sequence-to-sequence language model of a supported family, with its head. Its layers get a
            fused forward and stay.
        prompt_inputs: the prompts, made in evaluation mode; their index is of one number a text.
        inputs: of transformers' generate. Padding may stand on the left, as it wants it.

    Raises:
        ValueError, IndexError: the model does not generate, prompts that do not fit it or the texts, or an argument of
            `PromptModel.forward` that generate has no place for.
    """
    packed = packed_model(backbone)
    if isinstance(packed, PackedEncoderDecoder):
        with evaluating(backbone):
            return seq2seq_generation.generate(packed, prompt_inputs, inputs)
    if not packed.is_causal_lm:
        raise ValueError(f"generate needs a causal language model with its head, got {type(backbone).__name__}")
    if "shared_prefix_ids" in inputs or prompt_inputs.shared_ids is not None:
        raise ValueError("shared_prefix_ids must not be given to generate: put that text before each input")
    packed.check_prompts(prompt_inputs)
    texts = next((len(inputs[name]) for name in _TEXTS if inputs.get(name) is not None), 1)
    index, base, adapters = prompt_inputs.index, packed.base, prompt_inputs.adapters
    if index is not None and index.shape != (texts,):
        raise ValueError(f"prompt_ids must be ({texts},), one a text, got {index.shape}")
    with evaluating(backbone):
        prefix = packed.geometry.spread(prompt_inputs.prefix)
        if prompt_inputs.prompt is not None:
            prefix = _of_rows(packed, prompt_inputs)
        if index is not None and prefix:
            index = torch.tensor(index, device=next(iter(prefix.values()))[0].device)

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
            ids = args[0] if ids is None else ids
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = _positions(
                    ids.shape[1], kwargs.get("attention_mask"), kwargs.get("past_key_values"), ids.device
                )
            own = GenerationPass(prefix, index, positions, prompt_inputs.prefix_in_window, adapters)
            return args, kwargs | {"position_ids": positions + prompt_inputs.position_offset, "fastprompt_pass": own}

        hook = base.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            # What transformers compiles it keeps, for calls without this hook as well.
            return backbone.generate(**inputs | {"disable_compile": True})
        finally:
            hook.remove()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which keeps no cache."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _of_rows(packed: PackedBackbone, prompt_inputs: PromptInputs) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values that the prompts' rows (N, P, E) have in each layer: no text comes before them."""
    own, base = KeysPass(prompt_inputs.adapters), packed.base
    rows = prompt_inputs.prompt.to(base.get_input_embeddings().weight.dtype)
    more = {}
    if packed.geometry.per_layer:
        more["per_layer_inputs"] = base.get_decoder().get_per_layer_inputs(padding_of(base, rows))
    base(inputs_embeds=rows, use_cache=False, fastprompt_pass=own, **more)
    return dict(enumerate(own.found))


def _positions(rows: int, mask: Tensor | None, cache, device: torch.device) -> Tensor:
    """Places in their texts of the last `rows` rows, (B or 1, rows)."""
    if mask is not None and mask.ndim == 2:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -rows:]
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + rows, device=device).unsqueeze(0)
