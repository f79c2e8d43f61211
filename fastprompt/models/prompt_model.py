"""PromptModel: a frozen transformers model with a trained prompt."""

from pathlib import Path

from torch import Tensor, nn

from . import checkpoint
from .config import PromptConfig
from .initial import chosen_layers, new_prompt
from .packed import PackedBackbone


class PromptModel(nn.Module):
    """A frozen backbone with a trained prompt, run packed.

    It takes the backbone's own inputs and returns the backbone's own outputs, of the original length: prompt rows never
    show, labels and spans need no shifting, left and right padding give the same result. A causal language model in
    training mode, given labels, computes logits at labelled positions only and returns `logits=None` unless
    `return_logits=True`; in evaluation mode, and without labels, logits are (B, L, V).

    Where PEFT is right the results are PEFT's, up to rounding. Where they differ, on purpose: left-padded tokens take
    the positions of right-padded ones; token types are honoured for every head; hidden states, logits and spans do not
    move by P; a batch that came packed (restarting position_ids, no mask) does not leak between its samples.

    Args:
        backbone: a transformers model of a supported family (`fastprompt.models.families`), with or without a head. Its
            parameters are frozen, in place, except those of a classification or span head.
        config: what kind of prompt.

    Raises:
        TypeError, ValueError: for a backbone or a setting that does not fit, before anything is changed.
    """

    def __init__(self, backbone: nn.Module, config: PromptConfig) -> None:
        super().__init__()
        packed = PackedBackbone(backbone)
        chosen_layers(config, packed.geometry.layers)
        table = packed.geometry.positions
        if table is not None and config.position_offset == "peft" and config.num_virtual_tokens >= table:
            raise ValueError(
                f"num_virtual_tokens must leave room for text in the position table of {table} rows, "
                f"got {config.num_virtual_tokens}"
            )
        self.config, self.backbone, self._packed = config, backbone, packed
        freeze(backbone)
        self._head = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        self.prompt = new_prompt(config, packed)

    def forward(
        self,
        *,
        labels: Tensor | None = None,
        return_logits: bool = False,
        shared_prefix_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        lower_states: Tensor | None = None,
        **inputs,
    ):
        """The backbone's output class for its own keyword arguments; see the class for what differs.

        Args:
            labels: as the backbone's head takes them.
            return_logits: for a causal language model in training, give the logits of all text positions as well.
            shared_prefix_ids: (S,) token ids of a text that all samples begin with, such as an instruction. Causal
                models only: it stands after the prompt, runs once for the batch, and shows in no output. Results are
                those of the text at the start of every sample, but that under sliding-window attention it stays in view
                as the prompt does (see `PromptConfig.prefix_in_window`).
            label_smoothing: in [0, 1], of a causal language model's loss, as in `torch.nn.functional.cross_entropy`.
            lower_states: (T, D), what the method of that name gave for the same inputs: the pass begins at the first
                layer with a prefix. Outputs and gradients are those of the whole pass.

        Raises:
            ValueError: an input that does not fit, or one that a packed pass cannot serve.
        """
        return_dict = inputs.pop("return_dict", True)
        output = self._packed(
            inputs,
            **{self.config.kind: self.prompt().unsqueeze(0) if self.config.kind == "prompt" else self.prompt()},
            position_offset=self.position_offset,
            prefix_in_window=self.config.prefix_in_window,
            labels=labels,
            all_logits=return_logits or not self.training or labels is None,
            shared_ids=shared_prefix_ids,
            label_smoothing=label_smoothing,
            start=None if lower_states is None else (self.first_layer, lower_states),
        )
        return output.to_tuple() if return_dict is False else output

    def lower_states(self, **inputs) -> Tensor:
        """The (T, D) hidden states of the batch's T tokens that enter `first_layer`, sentence after sentence.

        They do not depend on anything that trains. In training mode they are one draw of the backbone's dropout.
        """
        return self._packed.lower_states(inputs, self.first_layer, self.position_offset)

    @property
    def first_layer(self) -> int:
        """The lowest layer that the prompt enters; what is below it computes a constant."""
        return 0 if self.config.kind == "prompt" else self.prompt.layers[0]

    @property
    def prompt_rows(self) -> tuple[int, int]:
        """Rows that a packed pass runs beside the text: for each sentence, and once for a batch."""
        rows = self.config.num_virtual_tokens if self.config.kind == "prompt" else 0
        return (0, rows) if self._packed.geometry.is_causal else (rows, 0)

    @property
    def position_offset(self) -> int:
        """What is added to the tokens' positions."""
        return self.config.num_virtual_tokens if self.config.position_offset == "peft" else 0

    @property
    def text_positions(self) -> int | None:
        """The longest text, in tokens, that the position table has room for beside the prompt; None: any length."""
        table = self._packed.geometry.positions
        return None if table is None else table - self.position_offset

    def head(self) -> dict[str, nn.Parameter]:
        """The parameters of a task's head, which train and are saved with the prompt, by their name in the backbone."""
        return {name: self.backbone.get_parameter(name) for name in self._head}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` (both PEFT's) and `fastprompt_config.json`."""
        checkpoint.save(self, Path(directory))

    @classmethod
    def from_pretrained(cls, backbone: nn.Module, directory: str | Path, *, trainable: bool = False) -> "PromptModel":
        """Load what `save_pretrained`, or PEFT, wrote.

        Args:
            backbone: the model it was trained on.
            directory: folder with `adapter_config.json` and `adapter_model.safetensors`.
            trainable: whether to go on training.

        Raises:
            FileNotFoundError, ValueError: a file is missing, of another kind, or of a shape that does not fit.
        """
        model = checkpoint.load(cls, backbone, Path(directory))
        if not trainable:
            model.requires_grad_(False)
        return model


def freeze(backbone: nn.Module) -> None:
    """No gradients for the base model and for a language-model head; a head for a task goes on training."""
    backbone.base_model.requires_grad_(False)
    output = backbone.get_output_embeddings()
    if output is not None:
        backbone.requires_grad_(False)
