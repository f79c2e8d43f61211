"""PackedBackbone: runs a transformers model on the packed tokens of a padded batch, with a prompt."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import captured, layout
from .attention import NAME
from .forward import SAMPLES, PackedForward
from .head import CausalHead
from .inputs import PromptInputs
from .layers import fuse_layers
from .layout import NO_LABEL, Packing, Plan
from .served import base_of, geometry, layer_list

# The inputs that say which tokens there are, and of which samples.
TELLING = "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"

NO_PROMPT = PromptInputs()


class Batch(NamedTuple):
    """The tensors that one pass reads beside the model's."""

    inputs: dict
    labels: Tensor | None
    items: Tensor | float | None
    prefix: dict[int, tuple[Tensor, Tensor]]
    prompt: Tensor | None
    shared_ids: Tensor | None
    states: Tensor | None


class StandIn(nn.Module):
    """In place of some layers: passes on the hidden states it is given or, if it has none, those that come first."""

    def __init__(self, states: Tensor | None) -> None:
        super().__init__()
        self.states = states

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.states is None:
            if hidden_states.ndim != 3:
                raise ValueError("lower_states are of layers that hand on one stream, these hand on several")
            self.states = hidden_states
        return self.states


class PackedBackbone:
    """A transformers model whose base model can run packed, in place: its layers get a fused forward, and stay.

    During a call, the base model's forward turns the padded batch it is given into one packed pass, and its packed
    output into what the unchanged head expects: hidden states (B, L, D) of the original length, zero at padding.

    It is made anew, and cheaply, for each call by what owns the model: kept, it would go on running the original's
    weights in a copy, a replica or an average of its owner.

    Args:
        model: the model.
        fused: its layers have their fused forward already.
    """

    def __init__(self, model: nn.Module, *, fused: bool = False) -> None:
        if not isinstance(model, PreTrainedModel):
            # A wrapper, such as a PeftModel of LoRA, has another base model than the one that its heads call.
            raise TypeError(f"backbone must be a transformers model, got {type(model).__name__}")
        placed = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
        if len(placed) > 1:
            raise ValueError(
                "backbone must be on one device, beside what is offloaded to the CPU or a disk: a packed pass is not "
                f"handed from one to another, got hf_device_map with {sorted(map(str, placed))}"
            )
        self.geometry = geometry(model)
        self.model, self.base = model, base_of(model)
        output_embeddings = model.get_output_embeddings() is not None
        self.is_causal_lm = self.geometry.is_causal and output_embeddings
        names = [each.__name__ for each in type(model).__mro__]
        by_token = (
            model is model.base_model or output_embeddings or any("TokenClassification" in name for name in names)
        )
        self.one_result_a_row = not by_token
        spans = any("QuestionAnswering" in name for name in names)
        means = getattr(model.config, "classifier_pooling", "cls") not in ("cls", "bos")  # of all rows
        self.pools_first_row = self.one_result_a_row and not spans and not means and not self.geometry.is_causal
        if not fused or model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        if not fused:
            fuse_layers(model)

    def __call__(
        self,
        inputs: dict,
        packing: Packing | None = None,
        prompt_inputs: PromptInputs = NO_PROMPT,
        *,
        labels: Tensor | None = None,
        all_logits: bool = True,
        label_smoothing: float = 0.0,
        start: tuple[int, Tensor] | None = None,
        pools_prompt: bool = False,
        make_head: Callable[..., CausalHead] = CausalHead,
        cuda_graphs: bool = False,
        compile_options: dict | None = None,
    ):
        """Run the model on `inputs` (its own keyword arguments, padded) and return its own output class.

        Args:
            inputs: input_ids or inputs_embeds, attention_mask, and what else the model takes, without labels.
            packing: what `pack` made of inputs and labels; None: it is made here.
            prompt_inputs: the prompts that the batch reads.
            labels: (B, L), for a causal language model the next-token labels; other heads are handed them as they are.
            all_logits: for a causal language model, whether the logits of all text positions are wanted.
            label_smoothing: of a causal language model's loss.
            start: a layer and the (T, D) hidden states that `lower_states` gave for it and the same inputs: embedding
                and lower layers, which must have no prompt, are left out.
            pools_prompt: heads of encoders that read the first row read the prompt's, as in PEFT, not the text's.
            make_head: of a causal language model, with another loss than its own.
            cuda_graphs, compile_options: as of `RunsPacked`.

        Raises:
            ValueError, IndexError: what a packed pass cannot serve, or prompts that do not fit.
        """
        if packing is None:
            packing, _ = self.pack(inputs, labels)
        self.check_prompts(prompt_inputs)
        entering = prompt_inputs.prompt, inputs.get("inputs_embeds"), self.base.get_input_embeddings().weight
        check_checkpointing(self.layers, entering, prompt_inputs)
        self._check_segments(packing, prompt_inputs)
        inputs = {name: value for name, value in inputs.items() if name not in ("packing", *SAMPLES)}
        layer, states = start or (0, None)
        if start is not None:
            self._check_start(layer, inputs, prompt_inputs)
        items, fused_lm_head, is_filled_up = None, False, packing.max_labels is not None
        if self.is_causal_lm:
            items, fused_lm_head = inputs.pop("num_items_in_batch", None), inputs.pop("fused_lm_head", False)
        elif label_smoothing:
            raise ValueError(f"label_smoothing is for causal language models here, got {label_smoothing}")
        elif labels is not None:
            inputs["labels"] = labels
        pools_prompt = pools_prompt and prompt_inputs.prompt is not None and not self.geometry.is_causal
        replaces_first = self.pools_first_row and (packing.left_padded or pools_prompt)

        def forward_of(batch: Batch) -> PackedForward:
            head = None
            if self.is_causal_lm:
                options = all_logits, label_smoothing, batch.items, fused_lm_head, is_filled_up
                head = make_head(self.model, batch.labels, *options)
            given = replace(prompt_inputs, prefix=batch.prefix, prompt=batch.prompt, shared_ids=batch.shared_ids)
            return PackedForward(
                *(self.base, self.geometry, packing, given),
                head=head,
                states=batch.states,
                replaces_first=replaces_first,
                pools_prompt=pools_prompt,
            )

        def run(batch: Batch, plan: Plan | None = None):
            with self._stand_in(range(layer), batch.states):
                return forward_of(batch).run(self.model, batch.inputs, plan, compile_options)

        prompts = prompt_inputs.prefix, prompt_inputs.prompt, prompt_inputs.shared_ids
        batch, found = Batch(inputs, labels, items, *prompts, states), None
        own_loss = make_head is CausalHead and not fused_lm_head
        if cuda_graphs and own_loss and captured.serves(self.model, inputs, is_filled_up):
            batch = batch if items is None else batch._replace(items=torch.as_tensor(items))  # another in each step
            window, adapters = prompt_inputs.prefix_in_window, prompt_inputs.adapters
            constants = repr(compile_options), packing.shape, all_logits, label_smoothing
            constants += layer, window, replaces_first, pools_prompt
            found = captured.run(self.model, run, batch, forward_of(batch).plan, constants, adapters)
        return run(batch) if found is None else found[0]

    def pack(
        self, inputs: dict, labels: Tensor | None = None, prompt_ids: Tensor | None = None
    ) -> tuple[Packing, np.ndarray | None]:
        """The packing of a batch, and the values of prompt_ids: what a step has to read of its device, it reads here.

        Nothing is read if the batch has its packing with it, or no mask, positions, bounds, labels and prompt_ids.

        Raises:
            ValueError: inputs that a packed pass cannot serve, or that contradict each other.
        """
        self.check_inputs(inputs)
        batch = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        shape = tuple(batch.shape[:2])
        labels = labels if self.is_causal_lm else None
        if labels is not None and labels.shape != batch.shape[:2]:
            raise ValueError(f"labels must be {shape}, as the batch, got {tuple(labels.shape)}")
        packing, wanted = inputs.get("packing"), {"labels": labels, "prompt_ids": prompt_ids}
        if packing is None:
            wanted |= {name: inputs.get(name) for name in TELLING}
        elif packing.labelled is not None:
            del wanted["labels"]
        values = layout.read({name: tensor for name, tensor in wanted.items() if tensor is not None})
        if packing is None:
            check_values(values)
            told = (values.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx"))
            packing = Packing.of_batch(shape, *told)
        if "labels" in values:
            labelled = np.flatnonzero(values["labels"].reshape(-1)[packing.index] != NO_LABEL)
            packing = replace(packing, labelled=labelled)
        return packing, values.get("prompt_ids")

    @torch.no_grad()
    def lower_states(self, inputs: dict, layer: int, position_offset: int = 0) -> Tensor:
        """The (T, D) hidden states that enter a layer below which there is no prompt, sentence after sentence."""
        packing, _ = self.pack(inputs)
        prompt_inputs = PromptInputs(position_offset=position_offset)
        self._check_segments(packing, prompt_inputs)
        inputs = {name: value for name, value in inputs.items() if name != "packing"}
        with self._stand_in(range(layer, self.geometry.layers)) as stand:
            PackedForward(self.base, self.geometry, packing, prompt_inputs).run(self.base, inputs)
        return stand.states.squeeze(0)

    @property
    def layers(self) -> nn.ModuleList:
        """The base model's layers."""
        return layer_list(self.base, self.geometry.attends)

    @contextmanager
    def _stand_in(self, which: Sequence[int], states: Tensor | None = None) -> Iterator[StandIn]:
        """For a while, one stand-in in the place of each of those layers: their list stays as long as it was."""
        layers = self.layers if which else []
        stand, own = StandIn(None if states is None else states.unsqueeze(0)), {i: layers[i] for i in which}
        try:
            for i in own:
                layers[i] = stand
            yield stand
        finally:
            for i, layer in own.items():
                layers[i] = layer

    def check_inputs(self, inputs: dict) -> None:
        """Raise a ValueError for what a packed pass cannot do, before any work."""
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
            raise ValueError("past_key_values and use_cache must not be given: a packed pass keeps no cache")
        if inputs.get("output_attentions"):
            raise ValueError("output_attentions must not be set: attention weights are never formed")
        if inputs.get(
            "output_router_logits", getattr(self.model.config.get_text_config(), "output_router_logits", False)
        ):
            raise ValueError(
                "output_router_logits must not be set: a packed pass has other rows to balance experts over"
            )
        if not isinstance(inputs.get("logits_to_keep", 0), int) or inputs.get("logits_to_keep", 0):
            raise ValueError("logits_to_keep must not be given: training computes labelled positions only")
        batch = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        check_rows(inputs, tuple(batch.shape[:2]))
        if inputs.get("packing") is not None:
            self._check_packing(inputs, tuple(batch.shape[:2]))

    @staticmethod
    def _check_packing(inputs: dict, shape: tuple[int, int]) -> None:
        """Of a batch that has its packing with it."""
        packing = inputs["packing"]
        if not isinstance(packing, Packing):
            raise TypeError(f"packing must be a Packing, as PackingCollator makes it, got {type(packing).__name__}")
        if packing.shape != shape:
            raise ValueError(f"packing must be of a batch {shape}, got one of {packing.shape}")
        for name in ("attention_mask", "seq_idx"):
            if inputs.get(name) is not None:
                raise ValueError(f"{name} must not be given with packing, which says which tokens there are")

    def check_prompts(self, prompt_inputs: PromptInputs) -> None:
        """Raise a ValueError or an IndexError for prompts that do not fit this backbone."""
        prompt_inputs.check(self.geometry)
        if prompt_inputs.adapters is not None:
            prompt_inputs.adapters.check(self.layers, self.geometry)

    def _check_segments(self, packing: Packing, prompt_inputs: PromptInputs) -> None:
        index = prompt_inputs.index
        if packing.came_packed and self.one_result_a_row:
            raise ValueError(
                "samples that share a row are not for a head with one result a row, "
                f"{type(self.model).__name__}: give each a row of its own, padded"
            )
        if index is not None and index.shape != (packing.segments,):
            raise ValueError(f"prompt_ids must be ({packing.segments},), one a sentence, got {index.shape}")

    @staticmethod
    def _check_start(layer: int, inputs: dict, prompt_inputs: PromptInputs) -> None:
        prompted = any(x is not None for x in (prompt_inputs.prompt, prompt_inputs.shared_ids, prompt_inputs.adapters))
        if prompted or not 0 < layer <= min(prompt_inputs.prefix, default=layer):
            raise ValueError(f"start must be at a layer above 0 with no prompt below it, got layer {layer}")
        if inputs.get("output_hidden_states"):
            raise ValueError(f"output_hidden_states must not be set with a start at layer {layer}: none below it runs")


def check_rows(inputs: dict, shape: tuple[int, int]) -> None:
    """What says which tokens there are, and of which samples; `Packing.of_batch` checks that it agrees."""
    for name, rows in (
        ("attention_mask", shape[:1]),
        ("position_ids", (1, shape[0])),
        ("token_type_ids", (1, shape[0])),
        ("seq_idx", (1, shape[0])),
    ):
        value = inputs.get(name)
        if value is None:
            continue
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) not in rows or value.shape[1] != shape[1]:
            raise ValueError(f"{name} must be {shape}, as the batch, got {got}")
    bounds, keys = inputs.get("cu_seq_lens_q"), inputs.get("cu_seq_lens_k")
    if keys is not None and bounds is None:
        raise ValueError(f"cu_seq_lens_k must be cu_seq_lens_q, None, got {keys}")
    if bounds is not None and (bounds.ndim != 1 or not len(bounds)):
        raise ValueError(f"cu_seq_lens_q must have shape (S+1,), got {tuple(bounds.shape)}")


def check_checkpointing(layers: nn.ModuleList, entering: Iterable[Tensor | None], prompt_inputs: PromptInputs) -> None:
    """Raise a ValueError for gradient checkpointing that would drop a gradient.

    The reentrant kind sees nothing train but what is handed to a layer as an argument, its hidden states; if they do,
    parameters within the layer get their gradients too, but a prefix is neither.

    Args:
        layers: of a model.
        entering: of what hidden states are made; None: nothing.
        prompt_inputs: the prompts that the batch reads.
    """
    adapters = prompt_inputs.adapters
    enters = any(each is not None and each.requires_grad for each in entering)
    prefixed = any(key.requires_grad or value.requires_grad for key, value in prompt_inputs.prefix.values())
    for layer in layers if torch.is_grad_enabled() and (prefixed or not enters) else ():
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if checkpoint is None or not layer.training or not getattr(layer, "gradient_checkpointing", False):
            continue
        reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", "torch's default")
        within = [*layer.parameters(), *(() if adapters is None else adapters.parameters())]
        if reentrant is not False and (prefixed or any(each.requires_grad for each in within)):
            raise ValueError(
                "gradient checkpointing needs use_reentrant=False, as in gradient_checkpointing_kwargs="
                "{'use_reentrant': False}: with a prefix, or with layers that train and no prompt rows that do, "
                f"the reentrant kind drops gradients, got {reentrant}"
            )


def check_values(values: dict[str, np.ndarray], mask_name: str = "attention_mask") -> None:
    """Raise a ValueError for what `Packing.of_batch` is not to be given."""
    mask, bounds, keys = (values.get(name) for name in (mask_name, "cu_seq_lens_q", "cu_seq_lens_k"))
    other = () if mask is None else mask[(mask != 0) & (mask != 1)]
    if len(other):
        raise ValueError(
            f"{mask_name} must hold 0 and 1, got {other[0]}: samples that share a row are told by position_ids "
            "that begin anew, by cu_seq_lens_q or by seq_idx"
        )
    if keys is not None and not np.array_equal(bounds, keys):
        raise ValueError(f"cu_seq_lens_k must be cu_seq_lens_q, {bounds}, got {keys}")


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of the backbone's weights, of a dtype, are in on a device: autocast leaves float64 as it is."""
    lowered = torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if lowered else dtype
