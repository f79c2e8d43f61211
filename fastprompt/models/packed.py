"""PackedBackbone: runs a transformers model on the packed tokens of a padded batch, with a prompt."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastprompt.ops import pack_prompt

from .attention import NAME, PackedPass
from .families import geometry
from .packing import Packing

# The stock arguments that a packed pass replaces. What else a head hands to its base model is passed on.
_REPLACED = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values")
_FLASH_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class PackedBackbone:
    """A transformers model whose base model can run packed, in place: nothing is replaced in it.

    During a call, two hooks on the base model turn the padded batch it is given into one packed pass, and its packed
    output into what the unchanged head expects: hidden states (B, L, D) of the original length, zero at padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.geometry = geometry(model)
        self.model, self.base = model, model.base_model
        self.is_causal_lm = self.geometry.is_causal and model.get_output_embeddings() is not None
        model.set_attn_implementation(NAME)
        self._parameters = list(inspect.signature(self.base.forward).parameters)

    def __call__(
        self,
        inputs: dict,
        *,
        prefix: dict[int, tuple[Tensor, Tensor]] | None = None,
        prompt: Tensor | None = None,
        position_offset: int = 0,
        prefix_in_window: bool = False,
        labels: Tensor | None = None,
        all_logits: bool = True,
        start: tuple[int, Tensor] | None = None,
    ):
        """Run the model on `inputs` (its own keyword arguments, padded) and return its own output class.

        Args:
            inputs: input_ids or inputs_embeds, attention_mask, and what else the model takes, without labels.
            prefix: layer index -> key and value, each (1, Hkv, P, D).
            prompt: (P, E) rows before every segment.
            position_offset: added to the tokens' positions.
            prefix_in_window: see `fastprompt.ops.prefix_attention`.
            labels: (B, L), for a causal language model the next-token labels; other heads are handed them as they are.
            all_logits: for a causal language model, whether the logits of all text positions are wanted.
            start: a layer and the (T, D) hidden states that `lower_states` gave for it and the same inputs: embedding
                and lower layers, which must have no prompt, are left out.
        """
        self.check_inputs(inputs)
        call = _Call(self, prefix or {}, prompt, position_offset, prefix_in_window)
        layer, call.states = start or (0, None)
        if start is not None and (prompt is not None or not 0 < layer <= min(call.prefix, default=layer)):
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
                call.labels, call.all_logits = labels, all_logits
                return call.causal_lm(inputs)
            return call.run(inputs if labels is None else inputs | {"labels": labels})

    @torch.no_grad()
    def lower_states(self, inputs: dict, layer: int, position_offset: int = 0) -> Tensor:
        """The (T, D) hidden states that enter a layer below which there is no prompt, sentence after sentence."""
        self.check_inputs(inputs)
        call = _Call(self, {}, None, position_offset, False)
        with self._stand_in(range(layer, self.geometry.layers)) as stand:
            call.run(inputs, self.base)
        return stand.states.squeeze(0)

    @contextmanager
    def _stand_in(self, which: Sequence[int], states: Tensor | None = None) -> Iterator["_StandIn"]:
        """For a while, one stand-in in the place of each of those layers: their list stays as long as it was."""
        lists = (module for module in self.base.modules() if isinstance(module, nn.ModuleList))
        layers = next(modules for modules in lists if len(modules) == self.geometry.layers) if which else []
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
        if any(inputs.get(name) is not None for name in _FLASH_KEYWORDS) and inputs.get("position_ids") is None:
            raise ValueError("cu_seq_lens_q needs position_ids beside it: they tell the segments of a packed batch")
        for layer in self.base.modules() if self.base.training else ():
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
                raise ValueError("gradient checkpointing needs use_reentrant=False: the reentrant kind drops prompts")


class _Call:
    """One call of a PackedBackbone: what its two hooks share."""

    def __init__(
        self,
        owner: PackedBackbone,
        prefix: dict[int, tuple[Tensor, Tensor]],
        prompt: Tensor | None,
        position_offset: int,
        prefix_in_window: bool,
    ) -> None:
        self.owner, self.prefix, self.prompt = owner, prefix, prompt
        self.position_offset, self.prefix_in_window = position_offset, prefix_in_window
        self.labels: Tensor | None = None
        self.all_logits = True
        self.front = 0  # prompt rows that stand once before all segments
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
        for name in _FLASH_KEYWORDS:
            given.pop(name, None)
        self.packing = packing = _packing(stock)
        self._check_positions(packing)
        positions = packing.positions + self.owner.geometry.first_position
        if stock["position_ids"] is not None:
            ids = stock["position_ids"]
            positions = ids.expand(packing.shape).flatten()[packing.index]
        packed = {"position_ids": positions + self.position_offset}
        if stock["token_type_ids"] is not None:
            packed["token_type_ids"] = stock["token_type_ids"].flatten()[packing.index]
        cu_seqlens = packing.cu_seqlens
        if self.states is not None:
            if len(self.states) != len(packing.index):
                raise ValueError(f"start must have the batch's {len(packing.index)} rows, got {len(self.states)}")
            packed["inputs_embeds"] = self.states
        elif self.prompt is not None:
            packed["inputs_embeds"] = self._embed(stock)
            cu_seqlens = self._add_prompt_rows(packed)
        elif stock["input_ids"] is not None:
            packed["input_ids"] = stock["input_ids"].flatten()[packing.index]
        else:
            packed["inputs_embeds"] = stock["inputs_embeds"].flatten(0, 1)[packing.index]
        packed = {name: tensor.unsqueeze(0) for name, tensor in packed.items()}
        # A mask of four dimensions is taken by transformers as prepared: it builds none of its own.
        prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.index.device)
        is_causal = self.owner.geometry.is_causal
        state = PackedPass(cu_seqlens, is_causal, self.prefix, self.front, self.prefix_in_window)
        if "use_cache" in self.owner._parameters:
            given["use_cache"] = False
        return (), given | packed | {"attention_mask": prepared, "fastprompt_pass": state}

    def _check_positions(self, packing: Packing) -> None:
        table = self.owner.geometry.positions
        if table is not None and packing.longest + self.position_offset > table:
            raise ValueError(
                f"input_ids must have at most {table - self.position_offset} tokens a sentence: the position table has "
                f"{table} rows and the prompt takes {self.position_offset}, got {packing.longest}"
            )

    def _embed(self, stock: dict) -> Tensor:
        """(R, E): the prompt rows and the embeddings of the tokens."""
        packing, embedding = self.packing, self.owner.base.get_input_embeddings()
        if stock["input_ids"] is not None:
            table, ids = embedding.weight, stock["input_ids"].flatten()[packing.index]
            scale = getattr(embedding, "embed_scale", 1.0)
            # The scale rounded as the model rounds it: Gemma's is 33.94 in float32 and 34 in bfloat16.
            scale = float(scale.to(table.dtype)) if isinstance(scale, Tensor) else float(scale)
        else:
            table, ids, scale = stock["inputs_embeds"].flatten(0, 1), packing.index, 1.0
        prompt = self.prompt.to(table.dtype).unsqueeze(0)
        per_segment = not self.owner.geometry.is_causal
        return pack_prompt(table, ids, packing.cu_seqlens, prompt, per_segment=per_segment, scale=scale)

    def _add_prompt_rows(self, packed: dict) -> Tensor:
        """Positions (0..P-1) and token types (0) of the prompt rows; returns the bounds of the segments with them."""
        packing, device = self.packing, self.packing.index.device
        prompt_rows = len(self.prompt)
        own = torch.arange(prompt_rows, device=device) + self.owner.geometry.first_position
        rows = {"position_ids": own, "token_type_ids": torch.zeros_like(own)}
        if self.owner.geometry.is_causal:
            self.front = prompt_rows
            packed["position_ids"] = torch.cat([rows["position_ids"], packed["position_ids"]])
            return packing.cu_seqlens
        segments = len(packing.cu_seqlens) - 1
        lengths = packing.cu_seqlens.diff().long()
        segment = torch.arange(segments, device=device).repeat_interleave(lengths)
        self.token_rows = torch.arange(len(packing.index), device=device) + (segment + 1) * prompt_rows
        begins = packing.cu_seqlens + torch.arange(segments + 1, device=device) * prompt_rows
        prompt_index = (begins[:-1, None] + torch.arange(prompt_rows, device=device)).flatten()
        for name in rows.keys() & packed.keys():
            whole = packed[name].new_empty(int(segments * prompt_rows) + len(packing.index))
            whole[self.token_rows] = packed[name]
            whole[prompt_index] = rows[name].repeat(segments)
            packed[name] = whole
        return begins.to(torch.int32)

    # -- what comes out of it ------------------------------------------------------------------------------------

    def unpack(self, base: nn.Module, args: tuple, output):
        hidden = output.last_hidden_state  # (1, R, D)
        if self.owner.is_causal_lm:
            output.last_hidden_state = hidden[:, self._head_rows()]
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
        return hidden[0, self.front :]

    def _pad(self, hidden: Tensor) -> Tensor:
        """(1, R, D) -> (B, L, D)."""
        tokens = self._tokens(hidden)
        padded = self.packing.unpack(tokens)
        if self.packing.left_padded and not self.owner.geometry.is_causal:
            # Heads of encoders read the first column, too: the first token's state stands there as well.
            padded[:, 0] = tokens[self.packing.first_rows]
        return padded

    # -- causal language models: logits where they are wanted ----------------------------------------------------

    def _head_rows(self) -> Tensor | slice:
        """The packed rows that the head is given: those that predict a label, or all of the text."""
        if self.labels is None:
            return slice(self.front, None)
        labels = self.labels.flatten()[self.packing.index]
        row = torch.arange(len(labels), device=labels.device) + self.front
        first = self.packing.positions == 0
        wanted = labels != -100
        if self.front:  # the prompt's last row predicts each segment's first token, as in PEFT
            predictor = torch.where(first, self.front - 1, row - 1)
        else:  # nothing predicts it
            predictor, wanted = row - 1, wanted & ~first
        self.targets = labels[wanted]
        if not self.all_logits:
            self.predictor = None  # the head's rows are the predictors themselves
            return predictor[wanted]
        begin = max(self.front - 1, 0)
        self.predictor = predictor[wanted] - begin
        return slice(begin, None)

    def causal_lm(self, inputs: dict):
        inputs = dict(inputs)
        items = inputs.pop("num_items_in_batch", None)
        output = self.run(inputs)
        logits, loss = output.logits[0], None  # (rows, V)
        if self.labels is not None:
            loss = self.owner.model.loss_function(
                logits=logits if self.predictor is None else logits[self.predictor],
                labels=self.targets,
                shift_labels=self.targets,
                vocab_size=logits.shape[-1],
                num_items_in_batch=items,
            )
        if self.all_logits or self.labels is None:
            logits = self.packing.unpack(logits[len(logits) - len(self.packing.index) :])
        else:
            logits = None
        return type(output)(loss=loss, logits=logits, hidden_states=output.hidden_states)


class _StandIn(nn.Module):
    """In place of some layers: passes on the hidden states it is given or, if it has none, those that come first."""

    def __init__(self, states: Tensor | None) -> None:
        super().__init__()
        self.states = states

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.states is None:
            self.states = hidden_states
        return self.states


def _packing(stock: dict) -> Packing:
    batch = stock["input_ids"] if stock["input_ids"] is not None else stock["inputs_embeds"]
    mask, ids = stock["attention_mask"], stock["position_ids"]
    if mask is None and ids is not None and ids.shape == batch.shape[:2] and len(batch) == 1:
        return Packing.of_positions(ids)
    return Packing.of_mask(mask if mask is not None else torch.ones_like(batch[:, :, 0] if batch.ndim == 3 else batch))
