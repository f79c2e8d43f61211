"""A soft prompt as new tokens of a plain model: for software that knows text, and no prompts."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt._extras import require
from fastprompt._files import read_json, write_text
from fastprompt.models.packed.served import geometry

from .backbone import check_plain, check_window, save, shared_copy
from .heads import save_beside

NEVER = -1e4  # a logit's bias of a token that is not to be written: its probability is 0, in half precision too
_LOG = logging.getLogger("fastprompt")


def write(learner, directory: Path, copy_backbone: bool) -> dict:
    """Write a plain transformers folder whose tokenizer puts the prompt, as new tokens, before every text.

    The model has no tied weights: the new tokens are for reading alone. Where the model's table of tokens had rows to
    spare, all logits are the prompt's; else there is one more for each new token, see `_extend_head`.

    Returns:
        "beside": what else trained, in a file of fastprompt's own; "model": what is loaded from the folder.

    Raises:
        ValueError: another method, or a backbone or tokenizer for which a prompt cannot be tokens.
    """
    prompted, tokenizer = learner.adapted.prompted, learner.tokenizer
    _check(learner)
    rows = prompted.prompt.encoded().detach()
    names = _names(tokenizer, len(rows))
    tokenizer = copy.deepcopy(tokenizer)
    model = shared_copy(learner.backbone)
    ids = _add_tokens(tokenizer, names)
    before = _extend(model, ids, rows)
    if model.can_generate() and model.get_output_embeddings() is not None:
        _never_written(model, [each for each in ids if each >= before])
    _prefix_templates(tokenizer, names, ids)
    save(model, tokenizer, directory)
    _check_tokenizer(learner.tokenizer, directory, ids)
    return {"beside": save_beside(learner, directory), "model": learner.backbone}


def _check(learner) -> None:
    prompted, backbone = learner.adapted.prompted, learner.backbone
    kind = None if prompted is None else prompted.prompt_config.kind
    if kind != "prompt":
        what = "a prefix lives in every layer and cannot be words" if kind == "prefix" else "this run has none"
        raise ValueError(f"'tokens' are for method prompt, rows before the text: {what}")
    if prompted.adapters is not None:
        raise ValueError("'tokens' are for a prompt alone: its adapters (adapter_size) are in no plain model")
    if backbone.config.is_encoder_decoder:
        raise ValueError("'tokens' are for encoders and causal models, got an encoder-decoder")
    if geometry(backbone).per_layer:
        raise ValueError(
            f"'tokens' do not fit family {backbone.config.model_type!r}, where tokens enter in every layer once more"
        )
    check_plain(learner, "tokens")
    check_window(learner, "tokens")
    if not getattr(learner.tokenizer, "is_fast", False):
        raise ValueError(f"'tokens' need a fast tokenizer, got {type(learner.tokenizer).__name__}")


def _names(tokenizer: Callable, count: int) -> list[str]:
    known, names = tokenizer.get_vocab(), [f"<|prompt_{n}|>" for n in range(count)]
    taken = [name for name in names if name in known]
    if taken:
        raise ValueError(f"the tokenizer must not have the tokens that stand for a prompt, got {taken[0]!r} in it")
    return names


def _add_tokens(tokenizer: Callable, names: Sequence[str]) -> list[int]:
    """Add tokens that no text is split within, and none is normalised to; their ids."""
    tokenizers = require("tokenizers", "train")
    added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(list(names))


# -- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _extend(model: nn.Module, ids: list[int], rows: Tensor) -> int:
    """Give new tokens their embeddings, in place; how many tokens the model had."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    before, scale = embedding.num_embeddings, _scale(embedding)
    count = max(before, max(ids) + 1)
    table = embedding.weight.new_zeros(count, embedding.embedding_dim)
    table[:before] = embedding.weight
    table[ids] = (rows.to(table.device) / scale).to(table.dtype)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    embedding.num_embeddings = count
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        config.vocab_size = count
        config.tie_word_embeddings = False  # what stands for reading a token is no longer what writes it
    if head is not None:
        _extend_head(head, count)
    return before


def _scale(embedding: nn.Module) -> float:
    """What the module multiplies its rows with, as Gemma's does."""
    ids = torch.arange(min(64, embedding.num_embeddings), device=embedding.weight.device)
    plain, made = embedding.weight[ids].double(), embedding(ids).double()
    scale = float((plain * made).sum() / (plain * plain).sum())
    if not torch.allclose(made, plain * scale, rtol=1e-2, atol=1e-2 * float(made.abs().max())):
        raise ValueError(f"'tokens' do not fit {type(embedding).__name__}, which does more than look tokens up")
    told = getattr(embedding, "scalar_embed_scale", None)  # Gemma's, which is used in the weight's dtype
    if told is not None:
        return float(torch.tensor(told, dtype=embedding.weight.dtype))
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def _extend_head(head: nn.Linear, count: int) -> None:
    """Rows of a head for tokens that are not to be written.

    With a bias that is far below all others. Without, a row of weights is the mean of all: its logit is never the
    largest, and its probability at most the mean of the others' (by Jensen's inequality), of V tokens 1/V.
    """
    before = head.weight.shape[0]
    weight = head.weight.new_zeros(count, head.weight.shape[1])
    weight[:before] = head.weight
    if head.bias is not None:
        bias = head.bias.new_full((count,), NEVER)
        bias[:before] = head.bias
        head.bias = nn.Parameter(bias, requires_grad=False)
    else:
        weight[before:] = head.weight.mean(0, dtype=torch.float64).to(weight.dtype)
    head.weight = nn.Parameter(weight, requires_grad=False)
    head.out_features = count


def _never_written(model: nn.Module, ids: list[int]) -> None:
    """transformers' generate takes the new tokens' logits away, whatever they are."""
    if ids:
        known = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = [*known, *ids]


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def _prefix_templates(tokenizer: Callable, names: Sequence[str], ids: Sequence[int]) -> None:
    """Have the prompt before each text, in place: in the tokenizer's post-processor, and in its chat templates."""
    backend = tokenizer.backend_tokenizer
    about = json.loads(backend.to_str())
    about["post_processor"] = _with_prompt(about["post_processor"], names, ids)
    backend.post_processor = type(backend).from_str(json.dumps(about)).post_processor
    text, template = "".join(names), tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: text + each for name, each in template.items()}
    elif template:
        tokenizer.chat_template = text + template


def _with_prompt(processor: dict | None, names: Sequence[str], ids: Sequence[int]) -> dict:
    """A post-processor that does what `processor` does, as tokenizer.json has it, with tokens before the text."""
    steps = [] if processor is None else [processor]
    if processor is not None and processor["type"] == "Sequence":
        steps = list(processor["processors"])
    made, template = [], None
    for step in steps:
        if step["type"] == "TemplateProcessing":
            template = step
            continue
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            template = _template_of(step)
            if step["type"] == "RobertaProcessing":
                options = {"add_prefix_space": step["add_prefix_space"], "trim_offsets": step["trim_offsets"]}
                made.append({"type": "ByteLevel", "use_regex": True} | options)
            continue
        made.append(step)
    template = template or {"single": [_text("A")], "pair": [_text("A"), _text("B", 1)], "special_tokens": {}}
    before = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    own = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in zip(names, ids, strict=True)}
    prompted = {
        "type": "TemplateProcessing",
        "single": before + template["single"],
        "pair": before + template["pair"],
        "special_tokens": template["special_tokens"] | own,
    }
    return {"type": "Sequence", "processors": [*made, prompted]}


def _text(name: str, kind: int = 0) -> dict:
    return {"Sequence": {"id": name, "type_id": kind}}


def _template_of(step: dict) -> dict:
    """A template that does what BERT's or RoBERTa's post-processor does."""
    (first, first_id), (last, last_id) = step["cls"], step["sep"]
    kind = 1 if step["type"] == "BertProcessing" else 0  # RoBERTa's has one type for both
    begin, end = ({"SpecialToken": {"id": each, "type_id": 0}} for each in (first, last))
    last_end = {"SpecialToken": {"id": last, "type_id": kind}}
    between = [end] if step["type"] == "BertProcessing" else [end, end]
    special = {
        name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ((first, first_id), (last, last_id))
    }
    single, pair = [begin, _text("A"), end], [begin, _text("A"), *between, _text("B", kind), last_end]
    return {"single": single, "pair": pair, "special_tokens": special}


def _check_tokenizer(before: Callable, directory: Path, ids: Sequence[int]) -> None:
    """See to it that what was written puts the prompt before a text; some classes make their own post-processor."""
    transformers = require("transformers", "train")
    probes = ("One two, three.",), ("One", "two")
    for attempt in range(2):
        after = transformers.AutoTokenizer.from_pretrained(directory)
        if all(after(*texts)["input_ids"] == [*ids, *before(*texts)["input_ids"]] for texts in probes):
            return
        if not attempt:
            file = directory / "tokenizer_config.json"
            about = read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            _LOG.info("%s: its own class leaves the prompt out, and is not named", file)
            write_text(file, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    raise ValueError(f"'tokens' do not fit {type(before).__name__}: what it saves does not put tokens before a text")
