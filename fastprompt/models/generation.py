"""Prompts in transformers' generate: every layer reads them in place, beside a cache that holds the text alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .packed.passes import GenerationPass

if TYPE_CHECKING:
    from .prompt_model import PromptModel

_TEXTS = ("input_ids", "inputs_embeds", "inputs")  # arguments of generate that tell how many texts there are


@torch.no_grad()
def generate(model: nn.Module, prompted: "PromptModel", prompt_ids: Tensor | Sequence[str] | None = None, **inputs):
    """What `model.generate(**inputs)` gives with a prompt before each text.

    It runs in evaluation mode, whatever the modules' mode, and leaves them in theirs.

    Args:
        model: a causal language model with its head, whose base model `prompted` has.
        prompted: prompts and adapters.
        prompt_ids: as of `PromptModel.forward`, one a text.
        inputs: of transformers' generate. Padding may stand on the left, as it wants it.

    Raises:
        ValueError: the model does not generate or has another base model, prompt_ids that do not fit, or an argument of
            `PromptModel.forward` that generate has no place for.
    """
    if not prompted._packed.geometry.is_causal or model.get_output_embeddings() is None:
        raise ValueError(f"generate needs a causal language model with its head, got {type(model).__name__}")
    if "shared_prefix_ids" in inputs:
        raise ValueError("shared_prefix_ids must not be given to generate: put that text before each input")
    base = prompted._packed.base
    if model.base_model is not base:
        raise ValueError(f"model must have the base model of the prompts as its own, got another {type(base).__name__}")
    with _evaluating(model, prompted):
        bank = prompted._bank(prompt_ids)
        index, prefix = bank["prompt_index"], bank.get("prefix")
        texts = next((len(inputs[name]) for name in _TEXTS if inputs.get(name) is not None), 1)
        if index is not None and index.shape != (texts,):
            raise ValueError(f"prompt_ids must be ({texts},), one a text, got {tuple(index.shape)}")
        if prefix is None:
            prefix = _of_rows(base, bank["prompt"], prompted.adapters)

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
            ids = args[0] if ids is None else ids
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = _positions(
                    ids.shape[1], kwargs.get("attention_mask"), kwargs.get("past_key_values"), ids.device
                )
            own = GenerationPass(prefix, index, positions, prompted.config.prefix_in_window, prompted.adapters)
            return args, kwargs | {"position_ids": positions + prompted.position_offset, "fastprompt_pass": own}

        hook = base.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            # What transformers compiles it keeps, for calls without this hook as well.
            return model.generate(**inputs | {"disable_compile": True})
        finally:
            hook.remove()


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which keeps no cache."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _of_rows(base: nn.Module, rows: Tensor, adapters: nn.ModuleList | None) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values that prompt rows (N, P, E) have in each layer: no text comes before them."""
    cache = DynamicCache()  # plain layers: a sliding one would cut the prompt
    own = GenerationPass({}, None, None, False, adapters)
    rows = rows.to(base.get_input_embeddings().weight.dtype)
    base(inputs_embeds=rows, past_key_values=cache, fastprompt_pass=own)
    return {i: (layer.keys, layer.values) for i, layer in enumerate(cache.layers)}


def _positions(rows: int, mask: Tensor | None, cache, device: torch.device) -> Tensor:
    """Places in their texts of the last `rows` rows, (B or 1, rows)."""
    if mask is not None and mask.ndim == 2:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -rows:]
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + rows, device=device).unsqueeze(0)
