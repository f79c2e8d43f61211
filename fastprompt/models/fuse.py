"""fuse: an existing PeftModel with a fused forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import shift_tokens_right

from .checkpoint import KINDS
from .packed import PromptInputs, layout, packed_model
from .packed.context import Context, ContextHead
from .packed.running import RunsPacked, on_host

MULTITASK, CPT = "MULTITASK_PROMPT_TUNING", "CPT"
FUSED_KINDS = KINDS | {MULTITASK: "prompt", CPT: "prompt"}  # of PEFT's types: what a pass is given
_PUT_BACK = {"forward", "prepare_inputs_for_generation"}


def fuse(peft_model, *, pools_prompt: bool = True, cuda_graphs: bool = False):
    """Give a PEFT prompt-learning model a packed forward, in place.

    It stays the same PeftModel with the same Parameters, checkpoints and `generate` (which runs as before): its class
    becomes a subclass of its own, so that it copies, pickles and trains as before.

    Loss, logits and gradients of its forward are PEFT's, up to rounding, without padding or with padding on the right:
    of base models, of causal language models, and of classification heads over encoders. What differs, on purpose:

    - outputs have the text's own length, where PEFT's prompt tuning and P-tuning show the virtual tokens: spans and
      token labels need no shifting;
    - hidden states are zero at padding. A span head's logits there, over which its loss is taken as well, are those of
      a row of zeros;
    - padding on the left gives what padding on the right gives, and classification heads over decoders pool the last
      token of the text under both (PEFT's prompt tuning pools padding on the right);
    - position_ids are honoured with prompt tuning and P-tuning as well, where PEFT drops them with a warning, and the
      samples of a batch that came packed do not see each other;
    - heads that average rows average the text's own;
    - a causal language model in training mode, given labels, returns `logits=None` beside its loss unless
      `return_logits=True`.

    Of encoder-decoders (T5, mT5, UMT5, BART, mBART, M2M100, which is NLLB) sequence-to-sequence language models with
    their heads are fused, with a prompt before the encoder's input (of MULTITASK_PROMPT_TUNING also one before the
    decoder's, as PEFT's forward has it, and its generate has not) or a prefix in the decoder's self-attention. PEFT
    hands layer i of a decoder of L layers the prefix of layer 2i mod L, so that of an even number half are read, each
    twice, and the others get no gradient. A fused model keeps to that, as PEFT's `generate` and its files do;
    `PromptModel` gives every layer its own. Rows of the decoder behind the last label are left out in training,
    num_items_in_batch is honoured, and encoder_last_hidden_state does not show the prompt.

    Its forward also takes `return_logits`, `shared_prefix_ids` and `label_smoothing`, as `PromptModel.forward` does;
    with MULTITASK_PROMPT_TUNING it takes `task_ids`, as PEFT's: each task of a batch is one prompt of the pass.

    Args:
        peft_model: a PeftModel whose active adapter is PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING,
            MULTITASK_PROMPT_TUNING or CPT (whose loss is its own), over a supported family. Beneath it there may be
            LoRA, or the like.
        pools_prompt: over encoders, a classification head and the pooler read the first virtual token of prompt tuning
            and its like, as PEFT does by mistake and as what it trained wants it; False: the text's first token.
        cuda_graphs: as of `PromptModel`, which says what it needs. It becomes an attribute, to be set at any time.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: for a model that cannot be fused; it is then left as it was.
    """
    from fastprompt._extras import require

    peft = require("peft", "bench")
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"peft_model must be a peft.PeftModel, got {type(peft_model).__name__}")
    if not isinstance(pools_prompt, bool):
        raise TypeError(f"pools_prompt must be a bool, got {pools_prompt!r}")
    if isinstance(peft_model, FusedForward):
        peft_model.pools_prompt, peft_model.cuda_graphs = pools_prompt, cuda_graphs
        return peft_model
    _kind(peft_model)
    replaced = peft_model.__dict__.get("forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not type(peft_model).forward:
        raise ValueError(f"peft_model's forward must be its class's own: fuse it before it is prepared, got {replaced}")
    packed = packed_model(_backbone(peft_model))
    if replaced is not None:  # PEFT leaves it there after `disable_adapter`
        del peft_model.forward
    peft_model.pools_prompt = pools_prompt
    peft_model.__class__ = _fused_class(type(peft_model))
    peft_model.cuda_graphs = cuda_graphs
    if packed.model is not packed.model.base_model or packed.model.get_output_embeddings() is not None:
        _name_for_trainer(packed.model)
    return peft_model


class FusedForward(RunsPacked):
    """What `fuse` puts before a PeftModel's own class."""

    pools_prompt = True

    @on_host
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
        labels, return_logits = kwargs.pop("labels", None), kwargs.pop("return_logits", False)
        shared_ids, label_smoothing = kwargs.pop("shared_prefix_ids", None), kwargs.pop("label_smoothing", 0.0)
        return_dict, task_ids = kwargs.pop("return_dict", None), self._checked(kwargs.pop("task_ids", None))
        other_loss = {}
        if _peft_type(self) == CPT:
            types = kwargs.pop("input_type_mask", None)
            if labels is not None:
                context = _context(self.active_peft_config, labels, types)
                labels, other_loss = context.labels, {"make_head": partial(ContextHead, context=context)}
        given = any(kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if labels is not None and not given and self._prompts_decoder:
            config = _backbone(self).config  # as PEFT shifts them, which is not every model's own way
            kwargs["decoder_input_ids"] = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | kwargs
        packed = packed_model(_backbone(self), fused=True)
        packing, tasks = packed.pack(inputs, labels, task_ids)
        if tasks is not None and tasks.shape != (packing.segments,):
            raise ValueError(f"task_ids must be ({packing.segments},), one a sentence, got {tasks.shape}")
        prompt_inputs = self._prompt_inputs(tasks, shared_ids)
        output = packed(
            *(inputs, packing, prompt_inputs),
            labels=labels,
            all_logits=return_logits or not self.training or labels is None,
            label_smoothing=label_smoothing,
            pools_prompt=self.pools_prompt,
            cuda_graphs=self.cuda_graphs,
            compile_options=self.compile_options,
            **other_loss,
        )
        return output.to_tuple() if return_dict is False else output

    @property
    def _prompts_decoder(self) -> bool:
        """The decoder of an encoder-decoder has prompt rows, too."""
        is_both = getattr(_backbone(self).config, "is_encoder_decoder", False)
        return is_both and _peft_type(self) == MULTITASK and self.active_peft_config.num_transformer_submodules == 2

    def _checked(self, task_ids: Tensor | None) -> Tensor | None:
        """What is told before any value is read."""
        peft_type = _peft_type(self)
        if (task_ids is not None) != (peft_type == MULTITASK):
            got = "none" if task_ids is None else f"some with {peft_type}"
            raise ValueError(f"task_ids must be given with {MULTITASK}, and with nothing else, got {got}")
        if task_ids is not None and getattr(task_ids, "dtype", None) not in (torch.int32, torch.int64):
            got = getattr(task_ids, "dtype", type(task_ids).__name__)
            raise TypeError(f"task_ids must be a tensor of torch.int32 or torch.int64, got {got}")
        return task_ids

    def _prompt_inputs(self, tasks: np.ndarray | None, shared_ids: Tensor | None) -> PromptInputs:
        """One encoding per step: PEFT's own encoder, whichever it is, on a batch of one, or of the tasks there are."""
        name, kind, config = self.active_adapter, _kind(self), self.active_peft_config
        device = self.prompt_encoder[name].embedding.weight.device
        # PEFT keeps the prompt's ids on the host, and would wait for their copy in each step.
        self.prompt_tokens[name] = self.prompt_tokens[name].to(device)
        index, batch = None, {"batch_size": 1}
        if tasks is not None:
            found, index = np.unique(tasks, return_inverse=True)
            wrong = found[(found < 0) | (found >= config.num_tasks)]
            if len(wrong):
                raise IndexError(f"task_ids must be in [0, {config.num_tasks}), got {wrong[0]}")
            batch = {"batch_size": len(found)} | {"task_ids": layout.tensor_on(found, device)}
        encoded, length = self.get_prompt(**batch), config.num_virtual_tokens
        decoder_prompt = encoded[:, length:] if self._prompts_decoder else None
        if kind == "prompt":
            encoded = encoded[:, :length]  # of an encoder-decoder there are twice as many
        else:
            encoded = getattr(encoded, "self_attention_cache", encoded)  # of an encoder-decoder: as PEFT shares it out
            layers = enumerate(encoded.layers)  # of some PEFT makes none
            encoded = {i: (layer.keys, layer.values) for i, layer in layers if layer.keys is not None}
        return PromptInputs(
            **{kind: encoded},
            decoder_prompt=decoder_prompt,
            index=index,
            shared_ids=shared_ids,
            position_offset=length,
            prefix_in_window=True,
        )

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

    With prompt learning that is the model without its head, or, over encoders and T5, nothing.
    """
    if not hasattr(model, "model"):
        model.model = SimpleNamespace()
    model.model._get_name = partial(str, type(model).__name__)


def _backbone(peft_model) -> nn.Module:
    """transformers' model beneath it, and beneath LoRA or the like between the two."""
    import peft

    model = peft_model.get_base_model()
    while isinstance(model, peft.PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(f"peft_model must hold no other prompts beneath its own, got {_peft_type(model)}")
        model = model.get_base_model()
    return model


def _context(config, labels: Tensor, types: Tensor | None) -> Context:
    decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
    return Context.of(labels, types, config.cpt_token_ids, config.cpt_tokens_type_mask, decay)


def _peft_type(peft_model) -> str:
    peft_type = peft_model.active_peft_config.peft_type
    return getattr(peft_type, "value", peft_type)


def _kind(peft_model) -> str:
    peft_type = _peft_type(peft_model)
    if peft_type not in FUSED_KINDS:
        raise ValueError(f"peft_model's active adapter must be one of {tuple(FUSED_KINDS)}, got {peft_type}")
    kind, config, backbone_config = FUSED_KINDS[peft_type], peft_model.active_peft_config, _backbone(peft_model).config
    if getattr(backbone_config, "is_encoder_decoder", False):
        _check_encoder_decoder(config, peft_type, backbone_config)
    return kind


def _check_encoder_decoder(config, peft_type: str, backbone_config) -> None:
    task = getattr(config.task_type, "value", config.task_type)
    if task != "SEQ_2_SEQ_LM":
        raise ValueError(f"task_type of an encoder-decoder's adapter must be SEQ_2_SEQ_LM, got {task}")
    if peft_type not in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", MULTITASK):
        raise ValueError(
            f"peft_model's active adapter must, over an encoder-decoder, be a prefix or a prompt, got {peft_type}"
        )
    if peft_type != "PREFIX_TUNING":
        return
    if config.num_transformer_submodules != 2:
        raise ValueError(
            "num_transformer_submodules of an encoder-decoder's prefix must be 2, or else PEFT mixes it up with "
            f"cross-attention, got {config.num_transformer_submodules}"
        )
    names = "num_decoder_layers", "decoder_layers"
    layers = next((getattr(backbone_config, name) for name in names if hasattr(backbone_config, name)), 0)
    if config.num_layers < layers:
        raise ValueError(f"num_layers of a prefix must be at least the decoder's {layers}, got {config.num_layers}")
