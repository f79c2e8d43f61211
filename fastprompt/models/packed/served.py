"""Which models are served: a rehearsal shows whether all attention reads the pass, and what a prompt must fit.

It runs a model of the same class and configuration on tensors without values: nothing is computed, no memory is taken,
and the model itself is not touched.
"""

import copy
import inspect
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ..families import CALLED, SUBLAYERS, Geometry
from .attention import NAME

ROWS = 3  # of a rehearsal
_KEPT = "_fastprompt_geometry"  # the attribute of a base model that was found to be served
_CHANGE_NOTHING = {"position_ids", "cache_position", "input_ids"}  # tensors that are passed on to no end
_MIXING = nn.Conv1d, nn.Conv2d, nn.RNNBase

_found: dict[tuple[type, str], Geometry] = {}


class NotServed(ValueError):
    """The reason why a model cannot run packed."""


def base_of(model: nn.Module) -> nn.Module:
    """The base model that the heads of `model` call.

    Raises:
        TypeError: it is no transformers model.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is None or not hasattr(model, "base_model"):
        raise TypeError(f"backbone must be a transformers model, got {type(model).__name__}")
    base, name = model.base_model, CALLED.get(family)
    return getattr(base, name, base) if name else base


def geometry(model: nn.Module) -> Geometry:
    """What a prompt must fit in a transformers model.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: it cannot run packed, and why.
    """
    base = base_of(model)
    known = base.__dict__.get(_KEPT)
    if known is not None and known.layers == base.config.get_text_config().num_hidden_layers:
        return known
    key = type(base), base.config.to_json_string(use_diff=False)
    try:
        if key not in _found:
            _found[key] = _rehearse(base)
        _check_modules(base, _found[key])
    except NotServed as reason:
        raise ValueError(f"backbone of family {base.config.model_type!r} is not served: {reason}") from reason
    base.__dict__[_KEPT] = _found[key]
    return _found[key]


@dataclass
class Rehearsal:
    """Stands for a pass, and writes down what attention is called with: module, is_causal, query, key and value."""

    calls: list[tuple] = field(default_factory=list)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: nothing, of the right shape."""
        for name, x in options.items():
            if isinstance(x, Tensor) and name not in _CHANGE_NOTHING:
                raise NotServed(f"{type(module).__name__} hands {name} to attention, which a packed pass does not know")
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise NotServed(f"{type(module).__name__} adds numbers to the scores beside the mask")
        if attention_mask is not None and attention_mask.shape[2:].numel() != 1:
            raise NotServed(f"{type(module).__name__} is handed a mask of the model's own making")
        is_causal = options.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        self.calls.append((module, bool(is_causal), query, key, value))
        return query.new_zeros(*query.shape[:-1], value.shape[-1]).transpose(1, 2), None


def _rehearse(base: nn.Module) -> Geometry:
    config = copy.deepcopy(base.config)
    _check_config(config)
    names = inspect.signature(type(base).forward).parameters
    for name in ("attention_mask", "position_ids", "inputs_embeds"):
        if name not in names:
            raise NotServed(f"{type(base).__name__} takes no {name}")
    try:
        with torch.device("meta"), torch.no_grad():
            model = _without_values(type(base), config)
            calls, tables, widths = [], _watch_tables(model), _watch_widths(model)
            ids, mask = torch.zeros(1, ROWS, dtype=torch.long), torch.ones(1, 1, 1, 1, dtype=torch.bool)
            inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": mask}
            if "use_cache" in names:
                inputs["use_cache"] = False
            shape = tuple(model(**inputs, fastprompt_pass=Rehearsal(calls)).last_hidden_state.shape)
    except NotServed:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise NotServed(f"{type(base).__name__} does not run on a packed row: {reason}") from error
    if shape[:2] != (1, ROWS):
        raise NotServed(f"{type(base).__name__} makes hidden states {shape} of {ROWS} rows")
    return _judged(model, calls, tables, widths)


def _without_values(kind: type, config) -> nn.Module:
    """A model that reads no value of a tensor when it runs."""
    with no_init_weights():
        model = kind(config).eval()
    if not kind._can_set_attn_implementation():
        _check_calls(model, [], 0)
    model.set_attn_implementation(NAME)
    if kind._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the others read which expert a row goes to
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # some read how far positions go
        if kinds is not None:
            module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    return model


def _check_config(config) -> None:
    """Varieties that a rehearsal would not show."""
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise NotServed("it is an encoder-decoder")
    if getattr(text, "add_cross_attention", False):
        raise NotServed("it has cross-attention, as add_cross_attention says")
    if getattr(text, "is_decoder", False) and hasattr(text, "type_vocab_size"):
        raise NotServed("it must be an encoder, got is_decoder set")


def _watch_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Of a model's embeddings those that are looked up from now on, but the words', by their names."""
    words, found = model.get_input_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not words:
            module.register_forward_pre_hook(partial(_found_table, found, name))
    return found


def _watch_widths(model: nn.Module) -> dict[nn.Module, int]:
    """Of modules in lists, the features of what they are handed from now on."""
    found = {}
    for each in model.modules():
        for module in each if isinstance(each, nn.ModuleList) else ():
            module.register_forward_pre_hook(partial(_found_width, found), with_kwargs=True)
    return found


def _found_width(found: dict[nn.Module, int], module: nn.Module, args: tuple, kwargs: dict) -> None:
    given = args[0] if args else kwargs.get("hidden_states")
    if isinstance(given, Tensor):
        found[module] = given.shape[-1]


def _found_table(found: dict[str, nn.Embedding], name: str, table: nn.Embedding, args: tuple) -> None:
    found[name] = table


def _judged(model: nn.Module, calls: list[tuple], tables: dict[str, nn.Embedding], widths: dict) -> Geometry:
    """The geometry, if all is as a packed pass needs it."""
    config = model.config.get_text_config()
    names = {module: name for name, module in model.named_modules()}
    attends = tuple(names[module] for module, *_ in calls)
    _check_calls(model, calls, config.num_hidden_layers)
    for module, _, *tensors in calls:
        features = [x.shape[3] for x in tensors]
        if len(set(features)) != 1:
            raise NotServed(f"queries, keys and values of {type(module).__name__} differ in features: {features}")
    keys = [key for _, _, _, key, _ in calls]
    sources = [next(n for n, key in enumerate(keys) if key is each) for each in keys]
    reads = tuple((source, key.shape[1], key.shape[3]) for source, key in zip(sources, keys, strict=True))
    kv_heads, head_dim = max(((heads, features) for _, heads, features in reads), key=lambda shape: shape[::-1])
    if any(heads > kv_heads for _, heads, _ in reads):
        raise NotServed(f"its layers have keys of several shapes, none of them the widest: {sorted(set(reads))}")
    uniform = reads == tuple((layer, kv_heads, head_dim) for layer in range(len(reads)))
    causal = {is_causal for _, is_causal, *_ in calls}
    if len(causal) != 1:
        raise NotServed("some of its layers are causal and some are not")
    per_layer = _looks_up_per_layer(model, tables)
    positions, first = _positions(tables)
    _check_pooler(model)
    layer = layer_list(model, attends)[0]
    for name, module in layer.named_modules():
        if isinstance(module, _MIXING):
            raise NotServed(f"{name}, a {type(module).__name__}, mixes rows outside attention")
    return Geometry(
        layers=len(attends),
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=model.get_input_embeddings().weight.shape[1],
        width=widths[layer],
        first_position=first,
        positions=positions,
        is_causal=causal.pop(),
        attends=attends,
        sublayers=next((each for each in SUBLAYERS if all(_has(layer, name) for name in each)), None),
        reads=None if uniform else reads,
        per_layer=per_layer,
    )


def _check_calls(model: nn.Module, calls: list[tuple], layers: int) -> None:
    """Every layer's attention was called, once, under the number that the layer has."""
    if calls and len(calls) == layers and all(getattr(call[0], "layer_idx", n) == n for n, call in enumerate(calls)):
        return
    called = Counter(type(module).__name__ for module, *_ in calls)
    kinds = {type(module).__name__ for module in model.modules() if "Attention" in type(module).__name__}
    if not calls:
        raise NotServed(f"its layers' {'/'.join(sorted(kinds)) or 'own'} do not call transformers' AttentionInterface")
    numbers = [getattr(module, "layer_idx", None) for module, *_ in calls]
    raise NotServed(f"of its {layers} layers attention was called {dict(called)}, by the numbers {numbers}")


def _looks_up_per_layer(model: nn.Module, tables: dict[str, nn.Embedding]) -> bool:
    """Whether tokens are looked up for each layer as well, in a table that is then left out of `tables`."""
    if "per_layer_inputs" not in inspect.signature(type(model).forward).parameters:
        return False
    return any([tables.pop(name) for name in list(tables) if name.endswith("embed_tokens_per_layer")])


def _positions(tables: dict[str, nn.Embedding]) -> tuple[int | None, int]:
    """Usable rows of the position table, and the number of the first; tables of token types are no matter."""
    found, first = None, 0
    for name, table in tables.items():
        last = name.rpartition(".")[2]
        if "type" in last:
            continue
        if "pos" not in last and last != "wpe":
            raise NotServed(f"it looks tokens up in {name} as well, where prompt rows have no place")
        # OPT adds an offset of its own; RoBERTa's kin count from behind the padding index.
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        found = table.num_embeddings - getattr(table, "offset", 0) - first
    return found, first


def _check_pooler(model: nn.Module) -> None:
    """A base model's pooler, which is run apart, reads the first row."""
    pooler = getattr(model, "pooler", None)
    albert = isinstance(pooler, nn.Linear) and isinstance(getattr(model, "pooler_activation", None), nn.Module)
    if pooler is not None and not albert and "[:, 0]" not in inspect.getsource(type(pooler).forward):
        raise NotServed(f"its pooler, a {type(pooler).__name__}, does not read the first row")


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def layer_list(base: nn.Module, attends: tuple[str, ...]) -> nn.ModuleList:
    """The list that has the layers, each with its module that attends, in their order."""
    parts = attends[0].split(".")
    for n in range(1, len(parts)):
        layers = base.get_submodule(".".join(parts[:n]))
        if isinstance(layers, nn.ModuleList):
            return layers
    raise NotServed(f"{attends[0]} is in no list of layers")


def _check_modules(base: nn.Module, found: Geometry) -> None:
    """The model has, where its class has them, modules that attend."""
    for number, name in enumerate(found.attends):
        try:
            module = base.get_submodule(name)
        except AttributeError as error:
            raise NotServed(f"it lacks {name}, which its class has") from error
        if not hasattr(module, "layer_idx") and not found.shares_modules:
            module.layer_idx = number
