"""One packed forward: what stands in for the base model's own while a model runs."""

import inspect
import itertools
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastprompt.ops import pack_prompt

from ..families import Geometry
from . import layout
from .head import CausalHead
from .inputs import PromptInputs
from .layout import Packing, Plan
from .passes import PackedPass
from .running import compiled
from .weights import has_plain_weight

# The stock arguments that a packed pass replaces. What else a head hands to its base model is passed on.
_REPLACED = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values")
SAMPLES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # of a batch that came packed

_SCALES = WeakIdKeyDictionary()  # of embeddings, by the tensor and the dtype of what is scaled: read once for all steps


class PackedForward:
    """A batch and its prompts, ready to run: all that it holds is set here, and nothing changes later.

    Args:
        base: the base model whose forward is stood in for.
        geometry: of it.
        packing: the batch.
        prompt_inputs: its prompts.
        head: of a causal language model; None: other heads are handed hidden states as they expect them.
        states: (T, D) to start from, above the embedding; None: it starts at the batch's tokens.
        replaces_first: the head reads the first column, and is to find the row there that stands for the sentence.
        pools_prompt: that row is the prompt's first, not the text's.

    Raises:
        ValueError: positions that the backbone does not have, or states of another number of tokens.
    """

    def __init__(
        self,
        base: nn.Module,
        geometry: Geometry,
        packing: Packing,
        prompt_inputs: PromptInputs,
        *,
        head: CausalHead | None = None,
        states: Tensor | None = None,
        replaces_first: bool = False,
        pools_prompt: bool = False,
    ) -> None:
        if states is not None and len(states) != len(packing.index):
            raise ValueError(f"start must have the batch's {len(packing.index)} rows, got {len(states)}")
        self.base, self.geometry, self.packing, self.prompt_inputs = base, geometry, packing, prompt_inputs
        self.head, self.states, self.replaces_first = head, states, replaces_first
        self.pooler = getattr(base, "pooler", None)
        self.prompt_rows = rows = prompt_inputs.rows(geometry.is_causal)
        index, pools = prompt_inputs.index, None
        if self.pooler is not None or replaces_first:
            pools = "prompt" if pools_prompt else "text"
        of_head = {} if head is None else head.planned(packing, rows.leading, index)
        self.plan = Plan.of(packing, rows, geometry, index, pools, of_head)

    def run(self, model: nn.Module, inputs: dict, plan: Plan | None = None, compile_options: dict | None = None):
        """The output of `model`, which has the base model, for its own keyword arguments, padded.

        Args:
            plan: its own, if it is on the device already.
            compile_options: those that the base model is compiled with; None: it is not.
        """
        # Not hooks: replicas of a model share the dictionaries that hooks are kept in, and run at the same time.
        base, head = self.base, self.head
        forward, own = base.forward, base.__dict__.get("forward")
        head_rows = None
        if compile_options is not None and own is None:
            forward = partial(compiled(type(base).forward, compile_options), base)
        if head is not None:
            head.check()

        def packed_forward(*args, **kwargs):
            nonlocal plan, head_rows
            stock, others = self._sorted(args, kwargs)
            plan = self.plan.to(_batch_of(stock).device) if plan is None else plan
            output = forward(**others | self._pack(stock, plan))
            hidden = output.last_hidden_state  # (1, R, D)
            self._unpack(output, plan)
            if head is not None:
                head_rows = head.rows(hidden, self._tokens(hidden, plan), plan)
                output.last_hidden_state = head_rows.given
            return output

        base.forward = packed_forward
        try:
            output = model(**inputs if head is None or not head.fused else inputs | head.asked(self.plan))
        finally:
            if own is None:
                del base.forward
            else:
                base.forward = own
        if plan is None:
            raise ValueError(
                f"the forward of {type(model).__name__} must call its base model, which has the prompts, and "
                f"{_name(model.forward)}, which stands there, did not"
            )
        if head is None:
            return output
        if head.fused:
            return head.scored(output, plan)
        return head.output(output, head_rows, len(self.packing.index), lambda logits: self._padded(logits, plan))

    # -- what goes into the base model ---------------------------------------------------------------------------

    def _sorted(self, args: tuple, kwargs: dict) -> tuple[dict, dict]:
        """Of what a head hands to its base model: what is replaced, and what is passed on."""
        names = _parameters(type(self.base).forward)
        given = dict(zip(names, args, strict=False)) | kwargs
        stock = {name: given.pop(name, None) for name in _REPLACED}
        for name in SAMPLES:
            given.pop(name, None)
        if "use_cache" in names:
            given["use_cache"] = False
        return stock, given

    def _pack(self, stock: dict, plan: Plan) -> dict:
        """What the base model is handed in place of the stock arguments."""
        embedding, rows = self.base.get_input_embeddings(), self.prompt_rows
        if stock["input_ids"] is not None and self.states is None and not has_plain_weight(embedding):
            stock = stock | {"input_ids": None, "inputs_embeds": embedding(stock["input_ids"])}
        batch = _batch_of(stock)
        packed = {"position_ids": plan.positions}
        if stock["token_type_ids"] is not None:
            packed["token_type_ids"] = self._token_types(stock["token_type_ids"].expand(self.packing.shape), plan)
        if self.states is not None:
            # Only its shape matters: the layers' stand-in passes the states on.
            wide, hidden = self.states, self.geometry.hidden
            packed["inputs_embeds"] = wide if wide.shape[1] == hidden else wide.new_zeros(len(wide), hidden)
        elif rows.length:
            packed["inputs_embeds"] = self._embed(stock, plan)
            if self.geometry.per_layer:
                packed["per_layer_inputs"] = self._per_layer(stock, plan)
        else:
            packed["input_ids" if batch is stock["input_ids"] else "inputs_embeds"] = packed_rows(batch, plan)
        packed = {name: tensor.unsqueeze(0) for name, tensor in packed.items()}
        # A mask of four dimensions is taken by transformers as prepared: it builds none of its own.
        prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.device)
        return packed | {"attention_mask": prepared, "fastprompt_pass": self._pass(plan)}

    def _pass(self, plan: Plan) -> PackedPass:
        geometry, given, bounds = self.geometry, self.prompt_inputs, plan.cu_seqlens
        weight = self.base.get_input_embeddings().weight
        num_prompts, rows = self.prompt_rows.leading
        return PackedPass(
            cu_seqlens=bounds if plan.cu_seqlens_rows is None else plan.cu_seqlens_rows,
            is_causal=geometry.is_causal,
            prefix=geometry.spread(given.prefix),
            prompt_index=plan.prompt_index,
            nothing=weight.new_empty(
                *(max(num_prompts, 1), geometry.kv_heads, 0, geometry.head_dim), device=bounds.device
            ),
            num_prompts=num_prompts,
            leading_rows=rows,
            leading_bounds=plan.leading_bounds,
            leading_index=plan.leading_index,
            prefix_in_window=given.prefix_in_window,
            adapters=given.adapters,
            max_seqlen=self._longest(),
            numbers=itertools.count() if geometry.shares_modules else None,
        )

    def _longest(self) -> int | None:
        """Rows that no segment exceeds. A batch that was filled up may run as a graph, made for other lengths, too."""
        if self.packing.max_labels is not None:
            return None
        return self.packing.longest + (0 if self.prompt_rows.is_leading else self.prompt_rows.length)

    def _token_types(self, types: Tensor, plan: Plan) -> Tensor:
        """(R,), 0 for prompt rows."""
        types = packed_rows(types, plan)
        if not self.prompt_rows.length:
            return types
        return types.new_zeros(len(plan.positions)).index_copy(0, plan.token_rows, types)

    def _embed(self, stock: dict, plan: Plan) -> Tensor:
        """(R, E): the prompt rows and the embeddings of the tokens."""
        embedding, given = self.base.get_input_embeddings(), self.prompt_inputs
        if stock["input_ids"] is not None:
            table, ids, scale = embedding.weight, packed_rows(stock["input_ids"], plan), scale_of(embedding)
        else:
            table, ids, scale = stock["inputs_embeds"].flatten(0, 1), plan.index, 1.0
            ids = torch.arange(len(table), device=table.device) if ids is None else ids
        rows = None if given.prompt is None else given.prompt.to(table.dtype)  # (N, P, E)
        if given.shared_ids is not None:
            shared = embedding(given.shared_ids).to(table.dtype).expand(self.prompt_rows.num_prompts, -1, -1)
            rows = shared if rows is None else torch.cat([rows, shared], 1)
        return pack_prompt(
            *(table, ids, plan.cu_seqlens, rows),
            prompt_index=plan.prompt_index,
            per_segment=not self.geometry.is_causal,
            scale=scale,
        )

    def _per_layer(self, stock: dict, plan: Plan) -> Tensor:
        """(R, layers, D'), what of each row enters in each layer: prompt rows are padding there, as images are."""
        if stock["input_ids"] is None:
            raise ValueError("inputs_embeds must not be given with a prompt: what enters in each layer is told by ids")
        given, (num_prompts, _) = self.prompt_inputs, self.prompt_rows.leading
        leading = [] if given.prompt is None else [padding_of(self.base, given.prompt)]
        if given.shared_ids is not None:
            leading.append(given.shared_ids.expand(num_prompts, -1))
        ids = torch.cat([torch.cat(leading, 1).flatten(), packed_rows(stock["input_ids"], plan)])
        return self.base.get_decoder().get_per_layer_inputs(ids)

    # -- what comes out of it ------------------------------------------------------------------------------------

    def _unpack(self, output, plan: Plan) -> None:
        """Make of the base model's packed output what a head expects; a causal head's rows are picked elsewhere."""
        hidden = output.last_hidden_state  # (1, R, D)
        if getattr(output, "hidden_states", None) is not None:
            if any(x.ndim != 3 for x in output.hidden_states):
                raise ValueError("output_hidden_states must not be set: the layers hand on several streams, not one")
            output.hidden_states = tuple(self._padded(self._tokens(x, plan), plan) for x in output.hidden_states)
        # The row that stands for each segment where one is pooled, (S, D).
        firsts = None if plan.first_rows is None else hidden[0].index_select(0, plan.first_rows)
        if self.pooler is not None:
            # It reads the first column, which left padding leaves empty.
            output.pooler_output = _pooled(self.base, self.pooler, firsts)
        if self.head is not None:
            return
        padded = self._padded(self._tokens(hidden, plan), plan)  # (B, L, D)
        if self.replaces_first and padded.shape[1]:
            padded[:, 0] = firsts  # such heads without a pooler read the first column themselves
        output.last_hidden_state = padded

    def _padded(self, packed: Tensor, plan: Plan) -> Tensor:
        return padded_rows(packed, plan.index, self.packing.shape)

    def _tokens(self, hidden: Tensor, plan: Plan) -> Tensor:
        """(1, R, D) -> (T, D), without prompt rows."""
        num_prompts, rows = self.prompt_rows.leading
        return (
            hidden[0, num_prompts * rows :] if plan.token_rows is None else hidden[0].index_select(0, plan.token_rows)
        )


def _pooled(base: nn.Module, pooler: nn.Module, firsts: Tensor) -> Tensor:
    """(S, D'), what the base model's pooler makes of the rows (S, D) that stand for segments."""
    if isinstance(pooler, nn.Linear):  # ALBERT's
        return base.pooler_activation(pooler(firsts))
    return pooler(firsts.unsqueeze(1))


def padding_of(base: nn.Module, prompt: Tensor) -> Tensor:
    """(N, P) ids of padding, in the places of the rows (N, P, E) of prompts."""
    padding = base.config.get_text_config().pad_token_id
    return torch.full(prompt.shape[:2], 0 if padding is None else padding, device=prompt.device)


def _batch_of(stock: dict) -> Tensor:
    return stock["input_ids"] if stock["input_ids"] is not None else stock["inputs_embeds"]


def packed_rows(batch: Tensor, plan: Plan) -> Tensor:
    """(B, L, ...) -> (T, ...)."""
    flat = batch.flatten(0, 1)
    return flat if plan.index is None else flat.index_select(0, plan.index)


def padded_rows(packed: Tensor, index: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """(T, ...) -> (B, L, ...), zero where the batch is padded."""
    if index is not None:
        padded = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
        packed = padded.index_copy(0, index, packed)
    return packed.unflatten(0, shape)


def _name(function: Callable) -> str:
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', repr(function))}"


@cache
def _parameters(forward: Callable) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]  # without self


def scale_of(embedding: nn.Module) -> float:
    """Of its rows, rounded as the model rounds it: Gemma's is 33.94 in float32 and 34 in bfloat16."""
    scale, dtype = getattr(embedding, "embed_scale", 1.0), embedding.weight.dtype
    if not isinstance(scale, Tensor):
        return float(scale)
    known = _SCALES.setdefault(scale, {})
    if dtype not in known:
        value = layout.read({"embed_scale": scale})["embed_scale"].item()
        known[dtype] = torch.tensor(value, dtype=dtype, device="cpu").item()
    return known[dtype]
