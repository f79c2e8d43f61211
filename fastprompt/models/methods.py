"""AdaptedBackbone: a base model run packed, and what of it trains, method by method."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastprompt._extras import require
from fastprompt._settings import check_fields, setting

from .config import PromptConfig
from .packed import PackedBackbone, PackedEncoderDecoder, packed_model
from .packed.served import base_of, geometry, layer_list
from .prompt_model import PromptModel

LOG = logging.getLogger("fastprompt")
METHODS = ("prefix", "prompt", "lora", "full", "head")


@dataclass(frozen=True)
class AdapterConfig:
    """What of a backbone trains.

    Attributes:
        method: "prefix" trains keys and values in every layer, "prompt" embeddings before the text, "lora" low-rank
            updates of the linear layers, "full" every weight, and "head" nothing of the backbone.
        num_virtual_tokens: length of the prefix or the prompt.
        init_text: a text that the prefix or prompt begins as, repeated or cut to its length: its keys and values in
            each layer, or its embeddings. None begins at random. With few examples a text does much better.
        layers: numbers of the layers that get a prefix, from 0, or from -1 for the last; None gives all of them one.
        position_offset: "peft" counts the text's positions from behind the prefix, as PEFT does; "none" from 0.
        adapter_size: width of bottleneck adapters that train beside a prefix or prompt; None adds none.
        lora_rank: rank of the updates of "lora"; their alpha is twice that.
        norms: whether the weights of all norms train as well.
        top_layers: how many of the last layers train as well.
        num_layers: how many of the backbone's layers are used, the first ones; None uses all.
        train_head: whether a task's head trains. If not, it stays as it began.

    Example:
        >>> adapter = AdapterConfig("prefix", num_virtual_tokens=16, init_text="Is this review good or bad?")

    Raises:
        ValueError: a value of another type or outside its range, or one that does not go with the method.
    """

    method: str = setting("prefix", "What trains.", basic=True, choices=METHODS)
    num_virtual_tokens: int = setting(16, "Length of the prefix or the prompt.", basic=True)
    init_text: str | None = setting(None, "Text that the prompt begins as: with few examples, much better.", basic=True)
    layers: Sequence[int] | None = setting(None, "Layers that get a prefix, such as 0,1,-1. Default: all.")
    position_offset: str = setting("peft", "Positions of the text begin behind the prompt.", choices=("peft", "none"))
    adapter_size: int | None = setting(None, "Bottleneck adapters of that size, beside a prompt.")
    lora_rank: int = setting(8, "Rank of lora.")
    norms: bool = setting(False, "The norms train, too.")
    top_layers: int = setting(0, "That many last layers train, too.")
    num_layers: int | None = setting(None, "Use the first layers of the backbone only. Default: all.")
    train_head: bool = setting(True, "A task's head trains.")

    def __post_init__(self) -> None:
        check_fields(AdapterConfig, vars(self))
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        for name, least in (("num_virtual_tokens", 1), ("lora_rank", 1), ("top_layers", 0), ("num_layers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be an integer, {least} or more, got {value!r}")
        if self.adapter_size is not None and self.method not in ("prompt", "prefix"):
            raise ValueError(f"adapter_size is for methods 'prompt' and 'prefix', got it with {self.method!r}")
        self.prompt()

    def prompt(self, tokenizer: Callable | None = None) -> PromptConfig | None:
        """The configuration of the prompt, or None where the method has none; `init_text` is read by the tokenizer."""
        if self.method not in ("prompt", "prefix"):
            return None
        more = {}
        if self.init_text is not None and tokenizer is not None:
            ids = tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(f"init_text must have at least one token, got none in {self.init_text!r}")
            more = {"init": "text", "init_ids": list(ids)}
        return PromptConfig(
            self.method,
            self.num_virtual_tokens,
            layers=self.layers,
            position_offset=self.position_offset,
            adapter_size=self.adapter_size,
            **more,
        )


class AdaptedBackbone(nn.Module):
    """A backbone with what an `AdapterConfig` says trains in it. It runs packed, so no pass pays for padding.

    Args:
        backbone: a model of a supported family, which is changed in place: "lora" puts PEFT's LoRA into the modules
            that PEFT chooses for the family. Of a model with a head the base model alone runs, except that an
            encoder-decoder runs whole.
        adapter: what trains.
        tokenizer: transformers' tokenizer, needed for `init_text`.

    Raises:
        ValueError: the adapter does not fit the backbone.
        ImportError: "lora" without peft.
    """

    def __init__(self, backbone: nn.Module, adapter: AdapterConfig, tokenizer: Callable | None = None) -> None:
        super().__init__()
        backbone = backbone if backbone.config.is_encoder_decoder else backbone.base_model
        self.prompted, self.backbone = None, backbone
        backbone.requires_grad_(adapter.method == "full")
        biases = [module for name, module in backbone.named_modules() if name.endswith("relative_attention_bias")]
        for module in biases:  # a packed pass adds them as constants
            module.requires_grad_(False)
        if biases and adapter.method == "full":
            LOG.warning(
                "the relative position biases of a backbone of family %r stay frozen", backbone.config.model_type
            )
        prompt = adapter.prompt(tokenizer)
        if prompt is not None:
            self.prompted = PromptModel(backbone, prompt)
        elif adapter.method == "lora":
            _add_lora(backbone, adapter.lora_rank)
        self.layers = packed_model(backbone, fused=prompt is not None).layers
        top_layers = adapter.top_layers
        if top_layers > len(self.layers):
            raise ValueError(f"top_layers must be in [0, {len(self.layers)}], the backbone's, got {top_layers}")
        for module in backbone.modules():
            if adapter.norms and "Norm" in type(module).__name__:
                module.requires_grad_(True)
        for layer in self.layers[len(self.layers) - top_layers :]:
            layer.requires_grad_(True)
        self.eval()  # a few hundred examples: the backbone's own dropout would only blur it

    @property
    def _packed(self) -> PackedBackbone | PackedEncoderDecoder:
        return packed_model(self.backbone, fused=True)

    @property
    def text_positions(self) -> int | None:
        """The longest text, in tokens, that the position table has room for; None: any length."""
        return self._packed.geometry.positions if self.prompted is None else self.prompted.text_positions

    def output(self, **inputs):
        """The backbone's own output for its own keyword arguments."""
        if self.prompted is not None:
            return self.prompted(**inputs)
        labels = inputs.pop("labels", None)
        return self._packed(inputs, labels=labels)

    def forward(self, *, layer: int | None = None, lower_states: Tensor | None = None, **inputs):
        """The last hidden states, as the base model gives them, for its own keyword arguments.

        Args:
            layer: return the hidden states after this many layers as well, as a second tensor.
            lower_states: what `PromptModel.lower_states` gave for the same inputs.
            inputs: of the base model, such as a batch of `PackingCollator`.
        """
        more = {} if layer is None else {"output_hidden_states": True}
        more |= {} if lower_states is None else {"lower_states": lower_states}
        output = self.output(**inputs, **more)
        last = output.last_hidden_state
        return last if layer is None else (last, output.hidden_states[layer])

    def prompt_parameters(self) -> list[nn.Parameter]:
        """The parameters of the prompt, which wants a larger learning rate than weights do."""
        return [] if self.prompted is None else list(self.prompted.prompt.parameters())

    def weights(self) -> list[nn.Parameter]:
        """The other parameters that train."""
        prompts = {id(parameter) for parameter in self.prompt_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in prompts]


def keep_layers(backbone: nn.Module, count: int) -> None:
    """Drop all layers above the first `count`, in place: in a small frozen model those in the middle often know more.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    served, config = geometry(backbone), backbone.config.get_text_config()
    total = served.layers
    if served.shares_modules:
        raise ValueError(f"num_layers must not be given: layers of family {config.model_type!r} share their modules")
    if not 1 <= count <= total:
        raise ValueError(f"num_layers must be in [1, {total}], the backbone's, got {count}")
    del layer_list(base_of(backbone), served.attends)[count:]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def _add_lora(backbone: nn.Module, rank: int) -> None:
    peft = require("peft", "lora")
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = None if backbone.config.model_type in known else ["q_proj", "v_proj"]  # what it chooses for most
    if targets and not any(name.rpartition(".")[2] in targets for name, _ in backbone.named_modules()):
        raise ValueError(
            f"method 'lora' must be one that PEFT knows for a backbone of family {backbone.config.model_type!r}"
        )
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    peft.inject_adapter_in_model(config, backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError(f"lora found no module to adapt in a backbone of family {backbone.config.model_type!r}")
