"""PackedBackbone: runs a transformers model on the packed tokens of a padded batch, with a prompt."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastprompt.ops import pack_prompt

from .attention import NAME, PackedPass
from .families import geometry
from .head import CausalHead
from .layers import fuse_layers
from .packing import Packing

# The stock arguments that a packed pass replaces. What else a head hands to its base model is passed on.
_REPLACED = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values")
_FLASH_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class PackedBackbone:
    """A transformers model whose base model can run packed, in place: its layers get a fused forward, and stay.

    During a call, two hooks on the base model turn the padded batch it is given into one packed pass, and its packed
    output into what the unchanged head expects: hidden states (B, L, D) of the original length, zero at padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.geometry = geometry(model)
        self.model, self.base = model, model.base_model
        self.is_causal_lm = self.geometry.is_causal and model.get_output_embeddings() is not None
        model.set_attn_implementation(NAME)
        fuse_layers(model)
        self._parameters = list(inspect.signature(self.base.forward).parameters)

    def __call__(
        self,
        inputs: dict,
        *,
        prefix: dict[int, tuple[Tensor, Tensor]] | None = None,
        prompt: Tensor | None = None,
        prompt_index: Tensor | None = None,
        shared_ids: Tensor | None = None,
        position_offset: int = 0,
        prefix_in_window: bool = False,
        labels: Tensor | None = None,
        all_logits: bool = True,
        label_smoothing: float = 0.0,
        start: tuple[int, Tensor] | None = None,
        adapters: nn.ModuleList | None = None,
    ):
        """Run the model on `inputs` (its own keyword arguments, padded) and return its own output class.

        Args:
            inputs: input_ids or inputs_embeds, attention_mask, and what else the model takes, without labels.
            prefix: layer index -> key and value, each (N, Hkv, P, D), a bank of N prefixes.
            prompt: (N, P, E), a bank of N times P rows to stand before segments.
            prompt_index: (B,) which entry of the bank each segment reads; None: the first.
            shared_ids: (S,) token ids of a text that all segments begin with, after the prompt; run once (causal only).
            position_offset: added to the tokens' positions.
            prefix_in_window: see `fastprompt.ops.prefix_attention`.
            labels: (B, L), for a causal language model the next-token labels; other heads are handed them as they are.
            all_logits: for a causal language model, whether the logits of all text positions are wanted.
            label_smoothing: of a causal language model's loss.
            start: a layer and the (T, D) hidden states that `lower_states` gave for it and the same inputs: embedding
                and lower layers, which must have no prompt, are left out.
            adapters: an `Adapters` made for this backbone, to act in this pass.
        """
        self.check_inputs(inputs)
        self._check_shared(shared_ids)
        call = _Call(self, prefix or {}, prompt, prompt_index, shared_ids, position_offset, prefix_in_window, adapters)
        layer, call.states = start or (0, None)
        prompted = any(each is not None for each in (prompt, shared_ids, adapters))
        if start is not None and (prompted or not 0 < layer <= min(call.prefix, default=layer)):
            raise ValueError(f"start must be at a layer above 0 with no prompt below it, got layer {layer}")
        if start is not None and inputs.get("output_hidden_states"):
            raise ValueError(f"output_hidden_states must not be set with a start at layer {layer}: none below it runs")
        with self._stand_in(range(layer), call.states):
            if self.is_causal_lm:
                batch = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
                if labels is not None and labels.shape != batch.shape[:2]:
                    raise ValueError(
                        f"labels must be {tuple(batch.shape[:2])}, as the batch, got {tuple(labels.shape)}"
                    )
                inputs = dict(inputs)
                items = inputs.pop("num_items_in_batch", None)
                call.head = CausalHead(self.model, labels, all_logits, label_smoothing, items)
                return call.head.output(call.run(inputs), call.packing)
            if label_smoothing:
                raise ValueError(f"label_smoothing is for causal language models here, got {label_smoothing}")
            return call.run(inputs if labels is None else inputs | {"labels": labels})

    @torch.no_grad()
    def lower_states(self, inputs: dict, layer: int, position_offset: int = 0) -> Tensor:
        """The (T, D) hidden states that enter a layer below which there is no prompt, sentence after sentence."""
        self.check_inputs(inputs)
        call = _Call(self, {}, None, None, None, position_offset, False, None)
        with self._stand_in(range(layer, self.geometry.layers)) as stand:
            call.run(inputs, self.base)
        return stand.states.squeeze(0)

    @property
    def layers(self) -> nn.ModuleList:
        """The base model's layers."""
        lists = (module for module in self.base.modules() if isinstance(module, nn.ModuleList))
        return next(modules for modules in lists if len(modules) == self.geometry.layers)

    @contextmanager
    def _stand_in(self, which: Sequence[int], states: Tensor | None = None) -> Iterator["_StandIn"]:
        """For a while, one stand-in in the place of each of those layers: their list stays as long as it was."""
        layers = self.layers if which else []
        stand, own = _StandIn(None if states is None else states.unsqueeze(0)), {i: layers[i] for i in which}
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
        if not isinstance(inputs.get("logits_to_keep", 0), int) or inputs.get("logits_to_keep", 0):
            raise ValueError("logits_to_keep must not be given: training computes labelled positions only")
        batch = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != batch.shape[:2]:
            raise ValueError(f"attention_mask must be {tuple(batch.shape[:2])}, as the batch, got {tuple(mask.shape)}")
        for layer in self.base.modules() if self.base.training else ():
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
                raise ValueError("gradient checkpointing needs use_reentrant=False: the reentrant kind drops prompts")

    def _check_shared(self, shared_ids: Tensor | None) -> None:
        if shared_ids is None:
            return
        if not self.geometry.is_causal:
            raise ValueError(
                "shared_prefix_ids is for causal models: where rows see later ones, each sentence has rows of its own"
            )
        if shared_ids.ndim != 1 or len(shared_ids) == 0:
            raise ValueError(f"shared_prefix_ids must be (S,) with S at least 1, got {tuple(shared_ids.shape)}")


class _Call:
    """One call of a PackedBackbone: what its two hooks share."""

    def __init__(
        self,
        owner: PackedBackbone,
        prefix: dict[int, tuple[Tensor, Tensor]],
        prompt: Tensor | None,
        prompt_index: Tensor | None,
        shared_ids: Tensor | None,
        position_offset: int,
        prefix_in_window: bool,
        adapters: nn.ModuleList | None,
    ) -> None:
        self.owner, self.prefix, self.prompt = owner, prefix, prompt
        self.prompt_index, self.shared_ids = prompt_index, shared_ids
        self.position_offset, self.prefix_in_window, self.adapters = position_offset, prefix_in_window, adapters
        self.head: CausalHead | None = None
        self.front = 0, 0  # entries, and rows of each, that stand once before all segments
        self.states: Tensor | None = None  # (T, D) to start from above the embedding

    def run(self, inputs: dict, model: nn.Module | None = None):
        base = self.owner.base
        hooks = [
            base.register_forward_pre_hook(self.pack, with_kwargs=True),
            base.register_forward_hook(self.unpack),
        ]
        try:
            return (self.owner.model if model is None else model)(**inputs)
        finally:
            for hook in hooks:
                hook.remove()

    # -- what goes into the base model ---------------------------------------------------------------------------

    def pack(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = dict(zip(self.owner._parameters, args, strict=False)) | kwargs
        stock = {name: given.pop(name, None) for name in _REPLACED}
        bounds = [given.pop(name, None) for name in _FLASH_KEYWORDS][0]
        self.packing = packing = _packing(stock, bounds)
        self._check_segments(packing)
        positions = packing.positions + self.owner.geometry.first_position
        if stock["position_ids"] is not None:
            ids = stock["position_ids"]
            positions = ids.expand(packing.shape).flatten()[packing.index]
        packed = {"position_ids": positions + self.position_offset + self._shared_rows}
        if stock["token_type_ids"] is not None:
            packed["token_type_ids"] = stock["token_type_ids"].flatten()[packing.index]
        cu_seqlens = packing.cu_seqlens
        if self.states is not None:
            if len(self.states) != len(packing.index):
                raise ValueError(f"start must have the batch's {len(packing.index)} rows, got {len(self.states)}")
            packed["inputs_embeds"] = self.states
        elif self.prompt is not None or self._shared_rows:
            packed["inputs_embeds"] = self._embed(stock, packed)
            if not self.owner.geometry.is_causal:
                cu_seqlens = self.segments_with_prompt
        elif stock["input_ids"] is not None:
            packed["input_ids"] = stock["input_ids"].flatten()[packing.index]
        else:
            packed["inputs_embeds"] = stock["inputs_embeds"].flatten(0, 1)[packing.index]
        packed = {name: tensor.unsqueeze(0) for name, tensor in packed.items()}
        # A mask of four dimensions is taken by transformers as prepared: it builds none of its own.
        prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.index.device)
        state = PackedPass(
            cu_seqlens,
            self.owner.geometry.is_causal,
            self.prefix,
            self.prompt_index,
            self.front,
            self.prefix_in_window,
            self.adapters,
        )
        if "use_cache" in self.owner._parameters:
            given["use_cache"] = False
        return (), given | packed | {"attention_mask": prepared, "fastprompt_pass": state}

    @property
    def _shared_rows(self) -> int:
        return 0 if self.shared_ids is None else len(self.shared_ids)

    def _check_segments(self, packing: Packing) -> None:
        table = self.owner.geometry.positions
        if table is not None and packing.longest + self.position_offset > table:
            raise ValueError(
                f"input_ids must have at most {table - self.position_offset} tokens a sentence: the position table has "
                f"{table} rows and the prompt takes {self.position_offset}, got {packing.longest}"
            )
        segments = len(packing.cu_seqlens) - 1
        if self.prompt_index is not None and self.prompt_index.shape != (segments,):
            raise ValueError(f"prompt_ids must be ({segments},), one a sentence, got {tuple(self.prompt_index.shape)}")

    def _embed(self, stock: dict, packed: dict) -> Tensor:
        """(R, E): the prompt rows and the embeddings of the tokens. Gives the prompt rows their places in `packed`."""
        packing, embedding = self.packing, self.owner.base.get_input_embeddings()
        scale = getattr(embedding, "embed_scale", 1.0)
        # The scale rounded as the model rounds it: Gemma's is 33.94 in float32 and 34 in bfloat16.
        scale = float(scale.to(embedding.weight.dtype)) if isinstance(scale, Tensor) else float(scale)
        if stock["input_ids"] is not None:
            table, ids = embedding.weight, stock["input_ids"].flatten()[packing.index]
        else:
            table, ids, scale = stock["inputs_embeds"].flatten(0, 1), packing.index, 1.0
        rows = None if self.prompt is None else self.prompt.to(table.dtype)  # (N, P, E)
        if self._shared_rows:
            shared = embedding(self.shared_ids).to(table.dtype)
            # Entries of a prefix bank read different keys in every layer: each has the text's rows to itself.
            entries = len(rows) if rows is not None else len(next(iter(self.prefix.values()), (shared[None],))[0])
            shared = shared.expand(entries, -1, -1)
            rows = shared if rows is None else torch.cat([rows, shared], 1)
        if self.owner.geometry.is_causal:
            self._place_front(packed, *rows.shape[:2])
        else:
            self._place_in_segments(packed, rows.shape[1])
        return pack_prompt(
            *(table, ids, packing.cu_seqlens, rows),
            prompt_index=self.prompt_index,
            per_segment=not self.owner.geometry.is_causal,
            scale=scale,
        )

    def _place_front(self, packed: dict, entries: int, rows: int) -> None:
        """Positions of rows that stand once before all segments: those before the text's."""
        self.front = entries, rows
        last = self.position_offset + self._shared_rows + self.owner.geometry.first_position
        own = torch.arange(last - rows, last, device=self.packing.index.device)
        packed["position_ids"] = torch.cat([own.repeat(entries), packed["position_ids"]])

    def _place_in_segments(self, packed: dict, prompt_rows: int) -> None:
        """Positions (0..P-1) and token types (0) of prompt rows that stand in every segment."""
        packing, device = self.packing, self.packing.index.device
        own = torch.arange(prompt_rows, device=device) + self.owner.geometry.first_position
        rows = {"position_ids": own, "token_type_ids": torch.zeros_like(own)}
        segments = len(packing.cu_seqlens) - 1
        self.token_rows = torch.arange(len(packing.index), device=device) + (packing.segment + 1) * prompt_rows
        begins = packing.cu_seqlens + torch.arange(segments + 1, device=device) * prompt_rows
        prompt_index = (begins[:-1, None] + torch.arange(prompt_rows, device=device)).flatten()
        for name in rows.keys() & packed.keys():
            whole = packed[name].new_empty(int(segments * prompt_rows) + len(packing.index))
            whole[self.token_rows] = packed[name]
            whole[prompt_index] = rows[name].repeat(segments)
            packed[name] = whole
        self.segments_with_prompt = begins.to(torch.int32)

    # -- what comes out of it ------------------------------------------------------------------------------------

    def unpack(self, base: nn.Module, args: tuple, output):
        hidden = output.last_hidden_state  # (1, R, D)
        if self.head is not None:
            entries, rows = self.front
            ends = torch.arange(entries, device=hidden.device) * rows + rows - 1
            entry = torch.zeros_like(self.packing.index)
            if self.prompt_index is not None:
                entry = self.prompt_index.to(entry)[self.packing.segment]
            output.last_hidden_state = self.head.rows(hidden, self.packing, ends, entry)
        else:
            output.last_hidden_state = self._pad(hidden)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._pad(state) for state in output.hidden_states)
        if getattr(base, "pooler", None) is not None:
            # It reads the first column, which left padding leaves empty: hand it each segment's first row.
            output.pooler_output = base.pooler(self._tokens(hidden)[self.packing.first_rows].unsqueeze(1))
        return output

    def _tokens(self, hidden: Tensor) -> Tensor:
        """(1, R, D) -> (T, D), without prompt rows."""
        if self.prompt is not None and not self.owner.geometry.is_causal:
            return hidden[0, self.token_rows]
        entries, rows = self.front
        return hidden[0, entries * rows :]

    def _pad(self, hidden: Tensor) -> Tensor:
        """(1, R, D) -> (B, L, D)."""
        tokens = self._tokens(hidden)
        padded = self.packing.unpack(tokens)
        if self.packing.left_padded and not self.owner.geometry.is_causal:
            # Heads of encoders read the first column, too: the first token's state stands there as well.
            padded[:, 0] = tokens[self.packing.first_rows]
        return padded


class _StandIn(nn.Module):
    """In place of some layers: passes on the hidden states it is given or, if it has none, those that come first."""

    def __init__(self, states: Tensor | None) -> None:
        super().__init__()
        self.states = states

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.states is None:
            self.states = hidden_states
        return self.states


def _packing(stock: dict, bounds: Tensor | None) -> Packing:
    batch = stock["input_ids"] if stock["input_ids"] is not None else stock["inputs_embeds"]
    mask, ids = stock["attention_mask"], stock["position_ids"]
    if mask is None and len(batch) == 1 and bounds is not None:
        return Packing.of_bounds(bounds, batch.shape[1])
    if mask is None and len(batch) == 1 and ids is not None and ids.shape == batch.shape[:2]:
        return Packing.of_positions(ids)
    return Packing.of_mask(mask if mask is not None else torch.ones_like(batch[:, :, 0] if batch.ndim == 3 else batch))
