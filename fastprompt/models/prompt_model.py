"""PromptModel: a frozen transformers model with a trained prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .bank import PromptBank
from .config import PromptConfig
from .for_trainers import ForTrainers
from .generation import evaluating, generate
from .packed import PackedBackbone, Packing, packed_model
from .packed.running import RunsPacked, on_host
from .prompt_init import chosen_layers


class PromptModel(RunsPacked, ForTrainers, PromptBank, PreTrainedModel):
    """A frozen backbone with a trained prompt, run packed.

    It takes the backbone's own inputs and returns the backbone's own outputs, of the original length: prompt rows never
    show, labels and spans need no shifting, left and right padding give the same result. A causal language model in
    training mode, given labels, computes logits at labelled positions only and returns `logits=None` unless
    `return_logits=True`; in evaluation mode, and without labels, logits are (B, L, V).

    Where PEFT is right the results are PEFT's, up to rounding. Where they differ, on purpose: left-padded tokens take
    the positions of right-padded ones; token types are honoured for every head; hidden states, logits and spans do not
    move by P; a classification head over an encoder reads the text's first token, not the prompt's (but see
    `PromptConfig.pools_prompt`); position_ids are honoured; samples that share a row of a batch do not see each other.

    A model may hold a bank of prompts of one shape, for languages or tasks: `prompt`, named "default", which it begins
    with, and `other_prompts`. The samples of one batch may read different ones. Adapters, if there are any, are common
    to all; they act in this model's own calls only, not in those of the backbone.

    An encoder-decoder (T5, mT5, UMT5, BART, mBART, M2M100) must have its language-model head. A prompt stands before
    the encoder's input, and a prefix in the decoder's self-attention, or wherever `PromptConfig.layers` says, each
    layer with its own (PEFT hands one to two layers). In training, given labels, logits are None likewise, and rows of
    the decoder behind the last label do not run. It has no adapters, shared_prefix_ids, lower_states and cuda_graphs.

    Args:
        backbone: a transformers model of a supported family (`fastprompt.models.families`), with or without a head. Its
            parameters are frozen, in place, except those of a classification or span head.
        config: what kind of prompt.
        cuda_graphs: training steps on a GPU run as CUDA graphs, forward and backward, if their batches have a fixed
            shape: those of a `fastprompt.training.PackingCollator` with max_tokens. Others, and what a graph cannot do
            (hooks in the backbone, gradient checkpointing; a warning says so), run as without. A graph is recorded at
            the first batch of each shape and number of prompts, and goes on with the dropout rates that the backbone
            has then. Its memory is used again by the model's next forward: a loss must have its backward before that,
            and once.

    Attributes:
        cuda_graphs: as given; it may be set at any time.

    Example:
        >>> collate = PackingCollator(max_tokens=[2048, 4096], max_samples=32)
        >>> model = PromptModel(backbone, PromptConfig("prefix", 32), cuda_graphs=True).cuda().train()
        >>> for batch in DataLoader(data, 32, shuffle=True, collate_fn=collate, pin_memory=True):
        ...     batch = {name: x.cuda(non_blocking=True) if torch.is_tensor(x) else x for name, x in batch.items()}
        ...     loss = model(**batch).loss
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Raises:
        TypeError, ValueError: for a backbone or a setting that does not fit, before anything is changed.
    """

    def __init__(self, backbone: nn.Module, config: PromptConfig, *, cuda_graphs: bool = False) -> None:
        if isinstance(backbone, PromptBank):
            raise TypeError(f"backbone must be a transformers model, got {type(backbone).__name__}")
        packed = packed_model(backbone)
        chosen_layers(config, packed.geometry.layers, packed.geometry.encoder_layers)
        table = packed.geometry.positions
        if table is not None and config.position_offset == "peft" and config.num_virtual_tokens >= table:
            raise ValueError(
                f"num_virtual_tokens must leave room for text in the position table of {table} rows, "
                f"got {config.num_virtual_tokens}"
            )
        PromptBank.__init__(self, backbone, config)
        self.cuda_graphs = cuda_graphs

    def __new__(cls, backbone: nn.Module | None = None, *args, **kwargs) -> "PromptModel":
        spans = "QuestionAnswering" in type(backbone).__name__
        return super().__new__(PromptModelForQuestionAnswering if spans and cls is PromptModel else cls)

    @on_host
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
                gradient; under DistributedDataParallel without find_unused_parameters, and under FSDP, one of zero.
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
        output = packed(
            *(inputs, packing, self.prompt_inputs(ids if read_ids is None else read_ids, shared_prefix_ids)),
            labels=labels,
            all_logits=return_logits or not self.training or labels is None,
            label_smoothing=label_smoothing,
            start=None if lower_states is None else (self.first_layer, lower_states),
            pools_prompt=self.prompt_config.pools_prompt,
            cuda_graphs=self.cuda_graphs,
            compile_options=self.compile_options,
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, *, prompt_ids: Tensor | Sequence[str] | None = None, **inputs):
        """What the backbone's own `generate` gives, with a prompt before each text.

        The cache holds the text alone, and the prompt is read in place in every layer; an encoder-decoder's prefix
        begins the cache of its decoder. It runs in evaluation mode, whatever the model's mode.

        Args:
            prompt_ids: as of `forward`, one a text, whatever the number of beams.
            inputs: of transformers' generate: input_ids (padded on the left), attention_mask, max_new_tokens, ...

        Raises:
            ValueError: the backbone is no causal language model with its head, an input does not fit, or
                shared_prefix_ids is given.
            IndexError: a value of prompt_ids out of range.
        """
        with torch.no_grad(), evaluating(self):
            return generate(self.backbone, self.prompt_inputs(prompt_ids), **inputs)

    def hidden_states(self, *, prompt_ids: Tensor | Sequence[str] | None = None, **inputs):
        """The output of the backbone's base model, without its head, for inputs as of `forward`, without labels."""
        packed, ids = PackedBackbone(self.backbone.base_model, fused=True), self._numbers(prompt_ids)
        packing, read_ids = packed.pack(inputs, None, ids if isinstance(ids, Tensor) else None)
        shared_ids = inputs.pop("shared_prefix_ids", None)
        return packed(inputs, packing, self.prompt_inputs(ids if read_ids is None else read_ids, shared_ids))

    def lower_states(self, **inputs) -> Tensor:
        """The (T, D) hidden states of the batch's T tokens that enter `first_layer`, sentence after sentence.

        They do not depend on anything that trains. In training mode they are one draw of the backbone's dropout.
        """
        return self._packed.lower_states(inputs, self.first_layer, self.position_offset)

    # -- what the backbone and the prompt make of a batch ----------------------------------------------------------

    @property
    def first_layer(self) -> int:
        """The lowest layer with something that trains; what is below it computes a constant."""
        return 0 if self.prompt_config.kind == "prompt" or self.adapters is not None else self.prompt.layers[0]

    @property
    def prompt_rows(self) -> tuple[int, int]:
        """Rows that a packed pass runs beside the text: for each sentence, and once for each prompt a batch reads."""
        rows = self.prompt_config.num_virtual_tokens if self.prompt_config.kind == "prompt" else 0
        return (0, rows) if self._packed.geometry.is_causal else (rows, 0)

    @property
    def text_positions(self) -> int | None:
        """The longest text, in tokens, that the position table has room for beside the prompt; None: any length."""
        table = self._packed.geometry.positions
        return None if table is None else table - self.position_offset


class PromptModelForQuestionAnswering(PromptModel):
    """What `PromptModel` makes of a backbone with a span head.

    transformers' Trainer finds out what a model's labels are from the names of its class and of its arguments.
    """

    @on_host
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
