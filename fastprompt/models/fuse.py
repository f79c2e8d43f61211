"""fuse: an existing PeftModel with a fused forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .checkpoint import KINDS
from .packed import PackedBackbone, PromptInputs

_PUT_BACK = {"forward", "prepare_inputs_for_generation"}


def fuse(peft_model):
    """Give a PEFT prompt-learning model a packed forward, in place.

    It stays the same PeftModel with the same Parameters, checkpoints and `generate` (which runs as before): its class
    becomes a subclass of its own, so that it copies, pickles and trains as before.

    Loss, logits and gradients of its forward are PEFT's, up to rounding, without padding or with padding on the right:
    of base models, of causal language models, and of classification heads over encoders, which with prompt tuning and
    P-tuning pool the first virtual token, as there (`PromptModel` pools the text's own). What differs, on purpose:

    - outputs have the text's own length, where PEFT's prompt tuning and P-tuning show the virtual tokens: spans and
      token labels need no shifting;
    - hidden states are zero at padding. A span head's logits there, over which its loss is taken as well, are those of
      a row of zeros;
    - padding on the left gives what padding on the right gives, and classification heads over decoders pool the last
      token of the text under both (PEFT's prompt tuning pools padding on the right);
    - position_ids are honoured with prompt tuning and P-tuning as well, where PEFT drops them with a warning, and the
      samples of a batch that came packed do not see each other;
    - a causal language model in training mode, given labels, returns `logits=None` beside its loss unless
      `return_logits=True`.

    Its forward also takes `return_logits`, `shared_prefix_ids` and `label_smoothing`, as `PromptModel.forward` does.

    Args:
        peft_model: a PeftModel whose active adapter is PREFIX_TUNING, PROMPT_TUNING or P_TUNING, over a supported
            family.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: for a model that cannot be fused; it is then left as it was.
    """
    from fastprompt._extras import require

    peft = require("peft", "bench")
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"peft_model must be a peft.PeftModel, got {type(peft_model).__name__}")
    if isinstance(peft_model, FusedForward):
        return peft_model
    _kind(peft_model)
    replaced = peft_model.__dict__.get("forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not type(peft_model).forward:
        raise ValueError(f"peft_model's forward must be its class's own: fuse it before it is prepared, got {replaced}")
    packed = PackedBackbone(peft_model.get_base_model())
    if replaced is not None:  # PEFT leaves it there after `disable_adapter`
        del peft_model.forward
    peft_model.__class__ = _fused_class(type(peft_model))
    if packed.model is not packed.model.base_model:
        _name_for_trainer(packed.model)
    return peft_model


class FusedForward:
    """What `fuse` puts before a PeftModel's own class."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
        kind = _kind(self)
        if kwargs.pop("task_ids", None) is not None:
            raise ValueError("task_ids must not be given: multitask prompts cannot be fused")
        labels, return_logits = kwargs.pop("labels", None), kwargs.pop("return_logits", False)
        shared_ids, label_smoothing = kwargs.pop("shared_prefix_ids", None), kwargs.pop("label_smoothing", 0.0)
        return_dict = kwargs.pop("return_dict", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | kwargs
        packed = PackedBackbone(self.get_base_model(), fused=True)
        packing, _ = packed.pack(inputs, labels)
        # One encoding per step: PEFT's own encoder, whichever it is, on a batch of one. It keeps the prompt's ids on
        # the host, and would wait for their copy in each step.
        name = self.active_adapter
        self.prompt_tokens[name] = self.prompt_tokens[name].to(self.prompt_encoder[name].embedding.weight.device)
        encoded = self.get_prompt(batch_size=1)
        if kind == "prefix":
            encoded = {i: (layer.keys, layer.values) for i, layer in enumerate(encoded.layers)}
        prompt_inputs = PromptInputs(
            **{kind: encoded},
            shared_ids=shared_ids,
            position_offset=self.active_peft_config.num_virtual_tokens,
            prefix_in_window=True,
        )
        output = packed(
            *(inputs, packing, prompt_inputs),
            labels=labels,
            all_logits=return_logits or not self.training or labels is None,
            label_smoothing=label_smoothing,
            pools_prompt=True,
        )
        return output.to_tuple() if return_dict is False else output

    @property
    def base_model_torch_dtype(self) -> torch.dtype:
        """PEFT asks the first of the base model's parameters; a replica has none under that name."""
        return self.get_base_model().get_input_embeddings().weight.dtype

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As PEFT's own, which leaves the methods it puts back behind as attributes: a replica would share them."""
        own = set(self.__dict__)
        try:
            with super().disable_adapter():
                yield
        finally:
            for name in _PUT_BACK - own:
                self.__dict__.pop(name, None)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Its class has no name in a module to be found by: a copy makes it anew.
        return _blank, (type(self).peft_class,), self.__dict__


@cache
def _fused_class(peft_class: type) -> type:
    return type(f"Fused{peft_class.__name__}", (FusedForward, peft_class), {"peft_class": peft_class})


def _blank(peft_class: type):
    fused = _fused_class(peft_class)
    return fused.__new__(fused)


def _name_for_trainer(model: nn.Module) -> None:
    """transformers' Trainer knows by the name of `base_model.model` whether labels are shifted for label smoothing.

    With prompt learning that is the model without its head, or, over encoders, nothing.
    """
    if not hasattr(model, "model"):
        model.model = SimpleNamespace()
    model.model._get_name = partial(str, type(model).__name__)


def _kind(peft_model) -> str:
    peft_type = getattr(peft_model.active_peft_config.peft_type, "value", peft_model.active_peft_config.peft_type)
    if peft_type not in KINDS:
        raise ValueError(f"peft_model's active adapter must be one of {tuple(KINDS)}, got {peft_type}")
    return KINDS[peft_type]
