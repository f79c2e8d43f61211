"""AdaptedBackbone: a base model run packed, and what of it trains, method by method."""

from torch import Tensor, nn

from fastprompt._extras import require

from .config import PromptConfig
from .packed import PackedBackbone
from .packed.served import base_of, geometry, layer_list
from .prompt_model import PromptModel

METHODS = ("head", "full", "lora", "prompt", "prefix")


class AdaptedBackbone(nn.Module):
    """Hidden states of a batch under one of the methods that are compared; all run packed, so none pays for padding.

    Args:
        backbone: a base model of a supported family, without a head. It is changed in place.
        method: "head": nothing of it trains. "full": all of it does. "lora": peft's LoRA, in the modules peft chooses
            for the family, with alpha twice the rank. "prompt" and "prefix": a `PromptModel`.
        prompt: of the kind `method`, where that is "prompt" or "prefix"; its adapters train with it.
        lora_rank: of "lora".
        norms: the weights of all norms train as well.
        top_layers: that many layers, the last ones, train as well.

    Raises:
        ValueError: a method that is unknown or does not fit the prompt, or more layers than there are.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: str,
        prompt: PromptConfig | None = None,
        *,
        lora_rank: int = 8,
        norms: bool = False,
        top_layers: int = 0,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if (prompt.kind if prompt else None) != (method if method in ("prompt", "prefix") else None):
            raise ValueError(f"prompt must be of the kind {method!r} of the method, got {prompt}")
        self.method, self.prompted, self.backbone = method, None, backbone
        backbone.requires_grad_(method == "full")
        if prompt is not None:
            self.prompted = PromptModel(backbone, prompt)
        elif method == "lora":
            _add_lora(backbone, lora_rank)
        self.layers = PackedBackbone(backbone, fused=prompt is not None).layers
        if not 0 <= top_layers <= len(self.layers):
            raise ValueError(f"top_layers must be in [0, {len(self.layers)}], the backbone's, got {top_layers}")
        for module in backbone.modules():
            if norms and "Norm" in type(module).__name__:
                module.requires_grad_(True)
        for layer in self.layers[len(self.layers) - top_layers :]:
            layer.requires_grad_(True)
        self.eval()  # a few hundred examples: the backbone's own dropout would only blur it

    @property
    def _packed(self) -> PackedBackbone:
        return PackedBackbone(self.backbone, fused=True)

    @property
    def text_positions(self) -> int | None:
        """The longest text, in tokens, that the position table has room for; None: any length."""
        return self._packed.geometry.positions if self.prompted is None else self.prompted.text_positions

    def forward(self, *, layer: int | None = None, **batch: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, L, D) hidden states, zero at padding, for input_ids and attention_mask (B, L).

        With `layer` two of them: the last, and what comes out of that many layers.
        """
        inputs = batch if layer is None else batch | {"output_hidden_states": True}
        output = self._packed(inputs) if self.prompted is None else self.prompted(**inputs)
        last = output.last_hidden_state
        return last if layer is None else (last, output.hidden_states[layer])

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Those of prompts, which want a larger learning rate than weights do."""
        return [] if self.prompted is None else list(self.prompted.prompt.parameters())

    def weights(self) -> list[nn.Parameter]:
        """What else trains."""
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
    if rank < 1:
        raise ValueError(f"lora_rank must be a positive integer, got {rank}")
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank), backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError(f"lora found no module to adapt in a backbone of family {backbone.config.model_type!r}")
