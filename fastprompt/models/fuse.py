"""fuse: an existing PeftModel with a fused forward."""

from types import MethodType

from torch import Tensor

from .packed import PackedBackbone


def fuse(peft_model):
    """Give a PEFT prompt-learning model a packed forward, in place.

    It stays the same PeftModel with the same Parameters, checkpoints and `generate` (which runs as before); loss and
    gradients of its forward are the same up to rounding. What differs is what `PromptModel` names: outputs have the
    text's own length (PEFT's prompt tuning shows its virtual tokens), and a causal language model in training mode
    returns `logits=None` beside its loss unless `return_logits=True`. Its forward also takes `return_logits`,
    `shared_prefix_ids` and `label_smoothing`, as `PromptModel.forward` does.

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
    _kind(peft_model)
    packed = PackedBackbone(peft_model.get_base_model())

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
        kind = _kind(self)
        if kwargs.pop("task_ids", None) is not None:
            raise ValueError("task_ids must not be given: multitask prompts cannot be fused")
        labels, return_logits = kwargs.pop("labels", None), kwargs.pop("return_logits", False)
        shared_ids, label_smoothing = kwargs.pop("shared_prefix_ids", None), kwargs.pop("label_smoothing", 0.0)
        return_dict = kwargs.pop("return_dict", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | kwargs
        if kind == "prompt":
            inputs.pop("position_ids", None)  # as PEFT does, which warns
        # One encoding per step: PEFT's own encoder, whichever it is, on a batch of one.
        encoded = self.get_prompt(batch_size=1)
        if kind == "prefix":
            encoded = {i: (layer.keys, layer.values) for i, layer in enumerate(encoded.layers)}
        output = packed(
            inputs,
            **{kind: encoded},
            shared_ids=shared_ids,
            label_smoothing=label_smoothing,
            position_offset=self.active_peft_config.num_virtual_tokens,
            prefix_in_window=True,
            labels=labels,
            all_logits=return_logits or not self.training or labels is None,
        )
        return output.to_tuple() if return_dict is False else output

    peft_model.forward = MethodType(forward, peft_model)
    return peft_model


def _kind(peft_model) -> str:
    from .checkpoint import KINDS

    peft_type = getattr(peft_model.active_peft_config.peft_type, "value", peft_model.active_peft_config.peft_type)
    if peft_type not in KINDS:
        raise ValueError(f"peft_model's active adapter must be one of {tuple(KINDS)}, got {peft_type}")
    return KINDS[peft_type]
