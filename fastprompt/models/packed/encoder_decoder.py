"""PackedEncoderDecoder: an encoder-decoder run packed, the tokens of each side as one row of segments."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import shift_tokens_right

from fastprompt.ops import pack_prompt
from fastprompt.ops._checks import check_targets

from ..families import ENCODER_DECODERS, Geometry
from . import layout
from .attention import NAME
from .backbone import NO_PROMPT, check_checkpointing, check_rows, check_values
from .forward import packed_rows, padded_rows, scale_of
from .inputs import PromptInputs
from .layers import fuse_layers
from .layout import NO_LABEL, Packing, Plan, PromptRows
from .seq2seq_head import Seq2SeqHead
from .stacks import Stack, fuse_stack

_NOT_TAKEN = (  # with a word on why
    ("past_key_values", "a packed pass keeps no cache"),
    ("use_cache", "a packed pass keeps no cache"),
    ("encoder_outputs", "the encoder runs with the prompt"),
    ("output_attentions", "attention weights are never formed"),
    ("packing", "only the batches of a single stack are packed where they are loaded"),
    ("position_ids", "encoder-decoders take none"),
    ("cu_seq_lens_q", "samples of an encoder-decoder have a row of the batch each"),
    ("seq_idx", "samples of an encoder-decoder have a row of the batch each"),
)


@dataclass(frozen=True, eq=False)
class Packings:
    """The two sides of a batch.

    Attributes:
        encoder: of the tokens that the encoder reads.
        shape: (B, L) of the decoder's batch.
        mask: (B, L) which of its rows there are; None: all.
        labels: (B, L), -100 for none; or None.
    """

    encoder: Packing
    shape: tuple[int, int]
    mask: np.ndarray | None
    labels: np.ndarray | None

    @property
    def segments(self) -> int:
        """S: one a row of the batch."""
        return self.shape[0]

    def decoder(self, all_rows: bool) -> Packing:
        """Of the decoder's rows: all there are, or those that some label's row sees."""
        mask = np.ones(self.shape, dtype=bool) if self.mask is None else self.mask != 0
        if self.labels is not None:
            labelled = self.labels != NO_LABEL
            if (labelled & ~mask).any():
                raise ValueError("labels must be -100 where decoder_attention_mask is 0, got others")
            if not all_rows:
                mask = mask & (labelled[:, ::-1].cumsum(1)[:, ::-1] > 0)
        return Packing.of_batch(self.shape, mask)


class PackedEncoderDecoder:
    """A sequence-to-sequence language model that runs packed, in place: what attends gets a packed forward, and stays.

    A call packs the encoder's tokens and the decoder's, runs the one and then the other, whose cross-attention has
    bounds of its own for queries and keys, and hands to the head the rows that are wanted.

    It is made anew, and cheaply, for each call by what owns the model, as `PackedBackbone`.

    Args:
        model: the model.
        fused: what attends has its packed forward already.

    Raises:
        TypeError, ValueError: it is none that is served.
    """

    is_causal_lm = False
    pools_first_row = False

    def __init__(self, model: nn.Module, *, fused: bool = False) -> None:
        family = model.config.model_type
        if family not in ENCODER_DECODERS:
            raise ValueError(
                f"backbone of family {family!r} is not served: of encoder-decoders those in {ENCODER_DECODERS} are"
            )
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"backbone of family {family!r} is not served: an encoder-decoder must be a sequence-to-sequence "
                f"language model with its head, got {type(model).__name__}"
            )
        self.model, self.base = model, model.base_model
        self.encoder = Stack(model.get_encoder(), is_decoder=False)
        self.decoder = Stack(model.get_decoder(), is_decoder=True)
        self.geometry = _both(self.encoder.geometry, self.decoder.geometry)
        if not fused or model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        if not fused:
            fuse_layers(model)
            fuse_stack(self.encoder)
            fuse_stack(self.decoder)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self.decoder.layers

    def __call__(
        self,
        inputs: dict,
        packings: Packings | None = None,
        prompt_inputs: PromptInputs = NO_PROMPT,
        *,
        labels: Tensor | None = None,
        all_logits: bool = True,
        label_smoothing: float = 0.0,
        start: tuple[int, Tensor] | None = None,
        pools_prompt: bool = False,
        cuda_graphs: bool = False,
        compile_options: dict | None = None,
    ):
        """Run the model on `inputs` (its own keyword arguments, padded) and return its own output class.

        Args:
            inputs: input_ids or inputs_embeds, attention_mask, and what else the model takes, without labels. Without
                decoder_input_ids and decoder_inputs_embeds the decoder reads the labels, shifted as the model does.
            packings: what `pack` made of inputs and labels; None: they are made here.
            prompt_inputs: the prompts that the batch reads.
            labels: (B, L).
            all_logits: whether the logits of all the decoder's positions are wanted.
            label_smoothing: of the loss.
            start, cuda_graphs, compile_options: are refused.
            pools_prompt: changes nothing here, where no row is pooled.

        Raises:
            ValueError, IndexError: what a packed pass cannot serve, or prompts that do not fit.
        """
        if start is not None:
            raise ValueError("lower_states must not be given: the layers of an encoder-decoder all run")
        if cuda_graphs or compile_options is not None:
            raise ValueError("cuda_graphs and compile() are not for encoder-decoders: their steps run as they are")
        if packings is None:
            packings, _ = self.pack(inputs, labels)
        self.check_prompts(prompt_inputs)
        self._check_segments(packings, prompt_inputs)
        entering = prompt_inputs.prompt, prompt_inputs.decoder_prompt
        entering += inputs.get("inputs_embeds"), inputs.get("decoder_inputs_embeds")
        for stack in (self.encoder, self.decoder):
            check_checkpointing(stack.layers, entering, prompt_inputs)
        inputs = dict(inputs)
        if labels is not None:
            check_targets(labels, self.model.config.vocab_size, NO_LABEL, "labels")
            if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
                inputs["decoder_input_ids"] = self.shifted(labels)
        all_logits = all_logits or labels is None
        packing, items = packings.decoder(all_logits), inputs.get("num_items_in_batch")
        head = Seq2SeqHead(self.model, labels, all_logits, label_smoothing, items, packing, packings.labels)
        encoded, keys = self.encode(inputs, packings.encoder, prompt_inputs)
        plan = self.plan_decoder(packing, prompt_inputs, _given(inputs, "").device)
        handed, places = self.decode_inputs(inputs, plan, packing, keys, prompt_inputs)
        with self.decoder.placed(places), head.reading(self.decoder.module, plan.token_rows):
            output = self.model(encoder_outputs=encoded, **handed)
        head.finish(output, lambda logits: padded_rows(logits, plan.index, packings.shape))
        _unpack(output, packings, plan, keys)
        return type(output)(**{each.name: getattr(output, each.name) for each in fields(output)})  # no keys of None

    def pack(
        self, inputs: dict, labels: Tensor | None = None, prompt_ids: Tensor | None = None
    ) -> tuple[Packings, np.ndarray | None]:
        """The packing of both sides of a batch, and the values of prompt_ids: all that a step reads of its device."""
        self.check_inputs(inputs)
        batch, made = _given(inputs, ""), _given(inputs, "decoder_")
        if made is None and labels is None:
            raise ValueError("labels, decoder_input_ids or decoder_inputs_embeds must be given: the decoder reads them")
        shape = tuple((labels if made is None else made).shape[:2])
        mask = inputs.get("decoder_attention_mask")
        for name, x in (("labels", labels), ("decoder_attention_mask", mask)):
            if x is not None and tuple(x.shape) != shape:
                raise ValueError(f"{name} must be {shape}, as what the decoder reads, got {tuple(x.shape)}")
        if shape[0] != len(batch):
            raise ValueError(f"labels and decoder_input_ids must have {len(batch)} rows, as the batch, got {shape[0]}")
        wanted = {"labels": labels, "decoder_attention_mask": mask, "prompt_ids": prompt_ids}
        wanted["attention_mask"] = inputs.get("attention_mask")
        values = layout.read({name: tensor for name, tensor in wanted.items() if tensor is not None})
        check_values(values)
        check_values(values, "decoder_attention_mask")
        encoder = Packing.of_batch(tuple(batch.shape[:2]), values.get("attention_mask"))
        packings = Packings(encoder, shape, values.get("decoder_attention_mask"), values.get("labels"))
        return packings, values.get("prompt_ids")

    def check_inputs(self, inputs: dict) -> None:
        """Raise a ValueError for what a packed pass cannot do, before any work."""
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs.get("decoder_input_ids") is not None and inputs.get("decoder_inputs_embeds") is not None:
            raise ValueError("one at most of decoder_input_ids and decoder_inputs_embeds must be given, got both")
        for name, why in _NOT_TAKEN:
            if inputs.get(name) is not None and inputs[name] is not False:
                raise ValueError(f"{name} must not be given: {why}")
        check_rows(inputs, tuple(_given(inputs, "").shape[:2]))

    def check_prompts(self, prompt_inputs: PromptInputs) -> None:
        """Raise a ValueError or an IndexError for prompts that do not fit this backbone."""
        prompt_inputs.check(self.geometry)
        if prompt_inputs.adapters is not None:
            raise ValueError("adapters must be None: they are not served in encoder-decoders")

    def _check_segments(self, packings: Packings | Packing, prompt_inputs: PromptInputs) -> None:
        index = prompt_inputs.index
        if index is not None and index.shape != (packings.segments,):
            raise ValueError(f"prompt_ids must be ({packings.segments},), one a sentence, got {index.shape}")

    def shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads if labels alone are given, as the model itself makes it."""
        own = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if own is not None:
            return own(labels)
        config = self.model.config  # of M2M100
        return shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)

    def encode(self, inputs: dict, packing: Packing, prompt_inputs: PromptInputs):
        """The encoder's own output for its packed rows (1, R, D), and the plan by which they stand there."""
        stack, given = self.encoder, prompt_inputs
        length = 0 if given.prompt is None else given.prompt.shape[1]
        offset = given.position_offset if length else 0
        rows = PromptRows(max(given.num_prompts, 1) if length else 0, length, False, False, offset)
        batch, options = _given(inputs, ""), {n: inputs[n] for n in ("output_hidden_states",) if n in inputs}
        planned = Plan.of(packing, rows, stack.geometry, given.index)
        plan, prefix = planned.to(batch.device), self._encoder_prefix(given)
        bounds, ids = plan.cu_seqlens if plan.cu_seqlens_rows is None else plan.cu_seqlens_rows, None
        if length:
            handed = {"inputs_embeds": _with_prompt(stack, inputs, "", plan, given.prompt)}
        elif batch is inputs.get("input_ids"):
            handed = {"input_ids": (ids := packed_rows(batch, plan))}
        else:
            handed = {"inputs_embeds": packed_rows(batch, plan)}
        if stack.is_relative and _has_gaps(packing):
            if prefix:
                raise ValueError("attention_mask must have no gaps within a text where the encoder has a prefix")
            embeds = stack.embedding(ids) if ids is not None else handed["inputs_embeds"]
            return _spread(stack, embeds, planned, options), plan
        places = stack.position_rows(plan.positions, bounds, ids, packing.longest + rows.token_offset)
        own = stack.make_pass(bounds, packing.longest + length, prefix, plan.prompt_index, None)
        handed = {name: x.unsqueeze(0) for name, x in handed.items()} | _prepared(batch.device)
        with stack.placed(places):
            return stack.module(**handed, **options, fastprompt_pass=own), plan

    def plan_decoder(self, packing: Packing, prompt_inputs: PromptInputs, device: torch.device) -> Plan:
        """Where the decoder's rows stand."""
        given, prefix = prompt_inputs, self.decoder_prefix(prompt_inputs)
        count, length = (0, 0) if given.decoder_prompt is None else given.decoder_prompt.shape[:2]
        offset = given.position_offset if prefix or length else 0  # after what stands in the cache, elsewhere
        if self.decoder.is_relative and _has_gaps(packing):
            raise ValueError("decoder_attention_mask must have no gaps within a text: rows count their own tokens")
        rows = PromptRows(count, length, False, bool(prefix), offset)
        return Plan.of(packing, rows, self.decoder.geometry, given.index).to(device)

    def decoder_prefix(self, given: PromptInputs) -> dict[int, tuple[Tensor, Tensor]]:
        """The decoder's layers are counted first."""
        return {layer: pair for layer, pair in given.prefix.items() if layer < len(self.decoder.layers)}

    def _encoder_prefix(self, given: PromptInputs) -> dict[int, tuple[Tensor, Tensor]]:
        first = len(self.decoder.layers)
        return {layer - first: pair for layer, pair in given.prefix.items() if layer >= first}

    def encoded(self, texts: dict, prompt_inputs: PromptInputs) -> tuple[Tensor, Tensor]:
        """The encoder's last states (B, L, D), prompt rows among them, padded on the right, and their mask (B, L).

        Args:
            texts: input_ids or inputs_embeds, and attention_mask or None.
            prompt_inputs: the prompts that they read.
        """
        self.check_inputs(texts)
        self.check_prompts(prompt_inputs)
        batch, mask = _given(texts, ""), texts.get("attention_mask")
        values = {} if mask is None else layout.read({"attention_mask": mask})
        check_values(values)
        packing = Packing.of_batch(tuple(batch.shape[:2]), values.get("attention_mask"))
        self._check_segments(packing, prompt_inputs)
        output, _ = self.encode(texts, packing, prompt_inputs)
        rows = 0 if prompt_inputs.prompt is None else prompt_inputs.prompt.shape[1]
        lengths = np.diff(packing.cu_seqlens) + rows
        there = np.arange(lengths.max(initial=0)) < lengths[:, None]
        index = layout.tensor_on(np.flatnonzero(there), batch.device)
        states = padded_rows(output.last_hidden_state[0], index, there.shape)
        return states, layout.tensor_on(there.astype(np.int64), batch.device)

    def decode_inputs(self, inputs: dict, plan: Plan, packing: Packing, keys: Plan, given: PromptInputs) -> tuple:
        """What the model is handed beside the encoder's output, and the rows of its decoder's table of positions."""
        stack, batch = self.decoder, _given(inputs, "decoder_")
        name = "decoder_input_ids" if batch is inputs.get("decoder_input_ids") else "decoder_inputs_embeds"
        prefix, prompt, queries = self.decoder_prefix(given), given.decoder_prompt, plan.cu_seqlens
        longest, length = packing.longest, 0
        if prompt is None:
            rows = packed_rows(batch, plan)
        else:
            queries, length = plan.cu_seqlens_rows, prompt.shape[1]
            rows, name = _with_prompt(stack, inputs, "decoder_", plan, prompt), "decoder_inputs_embeds"
        ids = rows if name == "decoder_input_ids" else None
        offset = given.position_offset if prefix or length else 0
        places = stack.position_rows(plan.positions, queries, ids, longest + offset)
        bounds = keys.cu_seqlens if keys.cu_seqlens_rows is None else keys.cu_seqlens_rows
        own = stack.make_pass(queries, longest + length, prefix, plan.prompt_index, bounds)
        others = {name: x for name, x in inputs.items() if name not in _OF_BATCH}
        prepared = _prepared(batch.device)["attention_mask"]
        masks = {"attention_mask": prepared, "decoder_attention_mask": prepared}
        return others | masks | {name: rows.unsqueeze(0), "fastprompt_pass": own, "use_cache": False}, places


_OF_BATCH = (
    *("input_ids", "attention_mask", "inputs_embeds", "num_items_in_batch", "token_type_ids"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", *(name for name, _ in _NOT_TAKEN)),
)


def _both(encoder: Geometry, decoder: Geometry) -> Geometry:
    """What prompts must fit: prompt rows stand in each of the encoder's segments, prefixes are the decoder's first."""
    same = (encoder.kv_heads, encoder.head_dim) == (decoder.kv_heads, decoder.head_dim)
    tables = [side.positions for side in (encoder, decoder) if side.positions is not None]
    beyond = encoder.layers if same else 0
    return replace(decoder, is_causal=False, positions=min(tables, default=None), encoder_layers=beyond)


def _given(inputs: dict, side: str) -> Tensor | None:
    ids = inputs.get(f"{side}input_ids")
    return ids if ids is not None else inputs.get(f"{side}inputs_embeds")


def _has_gaps(packing: Packing) -> bool:
    """Whether some mask has one within a text, which the stock path counts."""
    begins = np.repeat(packing.cu_seqlens[:-1], np.diff(packing.cu_seqlens))
    return not np.array_equal(packing.positions, np.arange(len(begins)) - begins)


def _spread(stack: Stack, embeds: Tensor, plan: Plan, options: dict):
    """The output of a stack whose rows (R, E) stand as far apart as they are counted, by its own padded forward: in a
    packed pass relative positions are those of neighbours.
    """
    bounds = plan.cu_seqlens if plan.cu_seqlens_rows is None else plan.cu_seqlens_rows
    shape = len(bounds) - 1, int(plan.positions.max()) + 1
    places = np.repeat(np.arange(shape[0]), np.diff(bounds)) * shape[1] + plan.positions
    mask = np.zeros(shape, dtype=np.int64)
    mask.reshape(-1)[places] = 1
    places, mask = (layout.tensor_on(each, embeds.device) for each in (places, mask))
    output = stack.module(inputs_embeds=padded_rows(embeds, places, shape), attention_mask=mask, **options)

    def packed(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, places).unsqueeze(0)

    output.last_hidden_state = packed(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(map(packed, output.hidden_states))
    return output


def _prepared(device: torch.device) -> dict[str, Tensor]:
    """A mask of four dimensions is taken by transformers as prepared: it builds none of its own."""
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}


def _with_prompt(stack: Stack, inputs: dict, side: str, plan: Plan, prompt: Tensor) -> Tensor:
    """(R, E): the prompt's rows and the embeddings of the tokens, segment after segment."""
    ids, embeds = (inputs.get(side + name) for name in ("input_ids", "inputs_embeds"))
    if ids is not None:
        table, ids, scale = stack.embedding.weight, packed_rows(ids, plan), scale_of(stack.embedding)
    else:
        table, ids, scale = embeds.flatten(0, 1), plan.index, 1.0
        ids = torch.arange(len(table), device=table.device) if ids is None else ids
    options = {"prompt_index": plan.prompt_index, "per_segment": True, "scale": scale}
    return pack_prompt(table, ids, plan.cu_seqlens, prompt.to(table.dtype), **options)


def _unpack(output, packings: Packings, plan: Plan, keys: Plan) -> None:
    """Make of hidden states those of the batch's own shapes, zero where nothing stands."""

    def padded(x: Tensor, plan: Plan, shape: tuple[int, int]) -> Tensor:
        text = x[0] if plan.token_rows is None else x[0].index_select(0, plan.token_rows)
        return padded_rows(text, plan.index, shape)

    of_encoder, shape = packings.encoder.shape, packings.shape
    output.encoder_last_hidden_state = padded(output.encoder_last_hidden_state, keys, of_encoder)
    if output.encoder_hidden_states is not None:
        output.encoder_hidden_states = tuple(padded(x, keys, of_encoder) for x in output.encoder_hidden_states)
    if output.decoder_hidden_states is not None:
        output.decoder_hidden_states = tuple(padded(x, plan, shape) for x in output.decoder_hidden_states)
