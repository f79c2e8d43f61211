"""PromptModel: a frozen transformers model with a trained prompt."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastprompt.nn import Prefix, Prompt

from . import checkpoint
from .bottleneck import Adapters
from .config import PromptConfig
from .generation import generate
from .packed import layout
from .packed.backbone import PackedBackbone, computed_in
from .packed.layout import Packing
from .prompt_init import chosen_layers, new_prompt

DEFAULT = "default"  # PEFT's name of a first adapter


class PromptModel(nn.Module):
    """A frozen backbone with a trained prompt, run packed.

    It takes the backbone's own inputs and returns the backbone's own outputs, of the original length: prompt rows never
    show, labels and spans need no shifting, left and right padding give the same result. A causal language model in
    training mode, given labels, computes logits at labelled positions only and returns `logits=None` unless
    `return_logits=True`; in evaluation mode, and without labels, logits are (B, L, V).

    Where PEFT is right the results are PEFT's, up to rounding. Where they differ, on purpose: left-padded tokens take
    the positions of right-padded ones; token types are honoured for every head; hidden states, logits and spans do not
    move by P; a classification head over an encoder reads the text's first token, not the prompt's; position_ids are
    honoured; samples that share a row of a batch do not see each other.

    A model may hold a bank of prompts of one shape, for languages or tasks: `prompt`, named "default", which it begins
    with, and `other_prompts`. The samples of one batch may read different ones. Adapters, if there are any, are common
    to all; they act in this model's own calls only, not in those of the backbone.

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
        self.config, self.backbone = config, backbone
        freeze(backbone)
        self._head = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        self.prompt = new_prompt(config, packed)
        self.other_prompts = nn.ModuleDict()
        self.adapters = None
        if config.adapter_size is not None:
            self.adapters = Adapters(packed, config.adapter_size).to(self.prompt.weight)

    def __new__(cls, backbone: nn.Module | None = None, *args, **kwargs) -> "PromptModel":
        spans = "QuestionAnswering" in type(backbone).__name__
        return super().__new__(PromptModelForQuestionAnswering if spans and cls is PromptModel else cls)

    def forward(
        self,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        packing: Packing | None = None,
        labels: Tensor | None = None,
        return_logits: bool = False,
        prompt_ids: Tensor | Sequence[str] | None = None,
        shared_prefix_ids: Tensor | None = None,
        lower_states: Tensor | None = None,
        **inputs,
    ):
        """The backbone's output class for its own keyword arguments; see the class for what differs.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds: as the backbone takes them. A row
                may hold several samples, told by position_ids that begin anew, by cu_seq_lens_q (of one row) or by
                seq_idx, unless the head gives one result a row.
            packing: of a batch that `fastprompt.training.PackingCollator` packed, what it gave under this name: then
                nothing is read of the device. Tokens are counted from the beginning of each sample, and what else tells
                samples (position_ids, cu_seq_lens_q) is the collator's, and not looked at.
            labels: as the backbone's head takes them.
            return_logits: for a causal language model in training, give the logits of all text positions as well.
            prompt_ids: (B,) int32 or int64, or a list of B numbers or names: which prompt each sample (of a packed
                batch: each segment) reads; None: the default. Prompts that no sample reads take no part, and get no
                gradient.
            shared_prefix_ids: (S,) token ids of a text that all samples begin with, such as an instruction. Causal
                models only: it stands after the prompt, runs once for the batch, and shows in no output. Results are
                those of the text at the start of every sample, but that under sliding-window attention it stays in view
                as the prompt does (see `PromptConfig.prefix_in_window`).
            label_smoothing: in [0, 1], of a causal language model's loss, as in `torch.nn.functional.cross_entropy`.
                (Not in the signature: transformers' Trainer takes every name there with "label" in it for a column
                without which there is no loss.)
            lower_states: (T, D), what the method of that name gave for the same inputs: the pass begins at the first
                layer with a prefix. Outputs and gradients are those of the whole pass.

        Raises:
            TypeError, ValueError: an input that does not fit, or one that a packed pass cannot serve.
            IndexError: a value of prompt_ids out of range.
        """
        return_dict, label_smoothing = inputs.pop("return_dict", True), inputs.pop("label_smoothing", 0.0)
        stock = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "packing": packing,
        }
        inputs |= {name: value for name, value in stock.items() if value is not None}
        packed, ids = self._packed, self._numbers(prompt_ids)
        packing, read_ids = packed.pack(inputs, labels, ids if isinstance(ids, Tensor) else None)
        bank, index = self._prompts(ids if read_ids is None else read_ids)
        output = packed(
            inputs,
            packing,
            **bank,
            prompt_index=index,
            position_offset=self.position_offset,
            prefix_in_window=self.config.prefix_in_window,
            labels=labels,
            all_logits=return_logits or not self.training or labels is None,
            shared_ids=shared_prefix_ids,
            label_smoothing=label_smoothing,
            start=None if lower_states is None else (self.first_layer, lower_states),
            adapters=self.adapters,
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, *, prompt_ids: Tensor | Sequence[str] | None = None, **inputs):
        """What the backbone's own `generate` gives, with a prompt before each text.

        The cache holds the text alone, and the prompt is read in place in every layer. It runs in evaluation mode,
        whatever the model's mode.

        Args:
            prompt_ids: as of `forward`, one a text, whatever the number of beams.
            inputs: of transformers' generate: input_ids (padded on the left), attention_mask, max_new_tokens, ...

        Raises:
            ValueError: the backbone is no causal language model with its head, an input does not fit, or
                shared_prefix_ids is given.
            IndexError: a value of prompt_ids out of range.
        """
        return generate(self.backbone, self, prompt_ids, **inputs)

    def _bank(self, prompt_ids: Tensor | Sequence[str | int] | None) -> dict:
        """As `_prompts`, for `generate`."""
        ids = self._numbers(prompt_ids)
        bank, index = self._prompts(layout.read({"": ids})[""] if isinstance(ids, Tensor) else ids)
        return bank | {"prompt_index": None if index is None else torch.tensor(index, device=self.prompt.weight.device)}

    def _prompts(self, ids: np.ndarray | None) -> tuple[dict, np.ndarray | None]:
        """What a packed pass takes of the prompts: those that a batch reads, and which of them each sample reads."""
        names, index = self.prompt_names, None
        used = names[:1]
        if ids is not None:
            found, index = np.unique(ids, return_inverse=True)
            index, found = index.reshape(ids.shape), found.tolist()
            if found and not 0 <= found[0] <= found[-1] < len(names):
                wrong = found[0] if found[0] < 0 else found[-1]
                raise IndexError(f"prompt_ids must be in [0, {len(names)}), got {wrong}")
            used = [names[i] for i in found]
        rows = [self._entry(name).rows().unsqueeze(0) for name in used]
        rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        # It is kept in float32 where the backbone runs in less: brought to that once, not layer by layer.
        rows = rows.to(computed_in(self.backbone.get_input_embeddings().weight))
        bank = rows if self.config.kind == "prompt" else self.prompt.split(rows)
        return {self.config.kind: bank}, index

    def _numbers(self, prompt_ids: Tensor | Sequence[str | int] | None) -> Tensor | np.ndarray | None:
        """The numbers of names; a tensor is still to be read."""
        if prompt_ids is None or isinstance(prompt_ids, Tensor):
            if prompt_ids is not None and prompt_ids.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"prompt_ids must be torch.int32 or torch.int64, got {prompt_ids.dtype}")
            return prompt_ids
        names = self.prompt_names
        unknown = [prompt_ids] if isinstance(prompt_ids, str) else [n for n in prompt_ids if n not in names]
        unknown = [n for n in unknown if type(n) is not int]
        if unknown:
            raise ValueError(f"prompt_ids must be a list of names in {names}, or a tensor, got {unknown[0]!r}")
        return np.array([n if type(n) is int else names.index(n) for n in prompt_ids], dtype=np.int64)

    def lower_states(self, **inputs) -> Tensor:
        """The (T, D) hidden states of the batch's T tokens that enter `first_layer`, sentence after sentence.

        They do not depend on anything that trains. In training mode they are one draw of the backbone's dropout.
        """
        return self._packed.lower_states(inputs, self.first_layer, self.position_offset)

    # -- what trainers ask a model ----------------------------------------------------------------------------------

    @property
    def loss_type(self) -> str | None:
        """The backbone's: transformers' Trainer counts the labels accordingly."""
        return getattr(self.backbone, "loss_type", None)

    def _get_name(self) -> str:
        """The backbone's: by it transformers' Trainer knows whether labels are to be shifted for label smoothing."""
        return type(self.backbone).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """As the backbone's own."""
        self.backbone.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """As the backbone's own; the older name."""
        self.backbone.gradient_checkpointing_enable(*args, **kwargs)

    # -- the bank ------------------------------------------------------------------------------------------------

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The prompts; their order gives the ids."""
        return DEFAULT, *self.other_prompts

    def _entry(self, name: str) -> Prompt | Prefix:
        if name not in self.prompt_names:
            raise ValueError(f"name must be one of {self.prompt_names}, got {name!r}")
        return self.prompt if name == DEFAULT else self.other_prompts[name]

    def add_prompt(self, name: str, init_from: str | None = None) -> None:
        """Add a prompt, which trains, at the end of the bank.

        Args:
            name: new, not empty, without ".", "/" and "\\"; it is also the name of a folder.
            init_from: the prompt it begins as a copy of; None: it begins as the configuration says.

        Raises:
            ValueError: a name that does not fit.
        """
        self._check_new(name)
        prompt = new_prompt(self.config, self._packed) if init_from is None else copy.deepcopy(self._entry(init_from))
        self.other_prompts[name] = prompt.train(self.training).requires_grad_(True)

    def drop_prompt(self, name: str) -> None:
        """Take a prompt other than the default out of the bank: the ids of later ones go down by one."""
        if name == DEFAULT:
            raise ValueError(f"name must not be {DEFAULT!r}: a model keeps its first prompt")
        self._entry(name)
        del self.other_prompts[name]

    def freeze_prompt(self, name: str) -> None:
        """Leave a prompt as it is from now on: it is read and gets no gradient."""
        self._entry(name).requires_grad_(False)

    def save_prompt(self, name: str, directory: str | Path) -> None:
        """Write one prompt as `save_pretrained` writes a model that has no other."""
        checkpoint.save(self, self._entry(name), Path(directory))

    def load_prompt(self, name: str, directory: str | Path, *, trainable: bool = False) -> None:
        """Add a prompt that `save_prompt`, `save_pretrained` or PEFT wrote. A head and adapters beside it are not read.

        Other weights beside it, such as rows of added tokens, must be the model's own.

        Args:
            name: as in `add_prompt`.
            directory: folder with `adapter_config.json` and `adapter_model.safetensors`.
            trainable: whether it goes on training; an encoder is needed for that, and is left out otherwise.

        Raises:
            FileNotFoundError, ValueError: a name that does not fit; a file that is missing or of another kind or shape.
        """
        self._check_new(name)
        prompt = checkpoint.load_prompt(self, Path(directory), trainable)
        self.other_prompts[name] = prompt.train(self.training).requires_grad_(trainable)

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name or set(name) & set("./\\"):
            raise ValueError(f"name must be a string, not empty, without '.', '/' and '\\', got {name!r}")
        if name == DEFAULT or hasattr(self.other_prompts, name):  # of a ModuleDict's entries, and its own attributes
            raise ValueError(f"name must be new, and none that torch.nn.ModuleDict has for itself, got {name!r}")

    # -- what the backbone and the prompt make of a batch ----------------------------------------------------------

    @property
    def _packed(self) -> PackedBackbone:
        return PackedBackbone(self.backbone, fused=True)

    @property
    def first_layer(self) -> int:
        """The lowest layer with something that trains; what is below it computes a constant."""
        return 0 if self.config.kind == "prompt" or self.adapters is not None else self.prompt.layers[0]

    @property
    def prompt_rows(self) -> tuple[int, int]:
        """Rows that a packed pass runs beside the text: for each sentence, and once for each prompt a batch reads."""
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
        """Write `adapter_config.json`, `adapter_model.safetensors` (both PEFT's) and `fastprompt_config.json`.

        With an encoder, PEFT's file holds what it makes, and `encoder.safetensors` beside it what trains; adapters go
        into `adapters.safetensors`. Prompts other than the default go into subfolders of their names, as adapters do in
        PEFT; each is whole. What else of the backbone trains, was loaded with a prompt, or was added to it (as by
        `resize_token_embeddings`) goes into PEFT's file as well.
        """
        directory = Path(directory)
        for name in self.other_prompts:
            self.save_prompt(name, directory / name)
        checkpoint.save(self, self.prompt, directory, others=list(self.other_prompts))

    @classmethod
    def from_pretrained(cls, backbone: nn.Module, directory: str | Path, *, trainable: bool = False) -> "PromptModel":
        """Load what `save_pretrained`, or PEFT, wrote: of PEFT's the one adapter in the folder; see `load_prompt`.

        Args:
            backbone: the model it was trained on.
            directory: folder with `adapter_config.json` and `adapter_model.safetensors`.
            trainable: whether to go on training; encoders are needed for that, and are left out otherwise.

        Raises:
            FileNotFoundError, ValueError: a file is missing, of another kind, or of a shape that does not fit.
        """
        model = checkpoint.load(cls, backbone, Path(directory), trainable)
        if not trainable:
            model.requires_grad_(False)
        return model


class PromptModelForQuestionAnswering(PromptModel):
    """What `PromptModel` makes of a backbone with a span head.

    transformers' Trainer finds out what a model's labels are from the names of its class and of its arguments.
    """

    def forward(
        self,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        prompt_ids: Tensor | Sequence[str] | None = None,
        **inputs,
    ):
        """As `PromptModel.forward`, with the places of answers for labels."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            prompt_ids=prompt_ids,
            start_positions=start_positions,
            end_positions=end_positions,
            **inputs,
        )


def freeze(backbone: nn.Module) -> None:
    """No gradients for the base model and for a language-model head; a head for a task goes on training."""
    backbone.base_model.requires_grad_(False)
    output = backbone.get_output_embeddings()
    if output is not None:
        backbone.requires_grad_(False)
