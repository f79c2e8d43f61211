"""A soft prompt as tokens of a plain model: the prompt's logits, by transformers alone."""

import json

import pytest
import torch
import transformers
from helpers import COMMON, CONFIGS, WORDS
from stand_in import TEXTS, P, load
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fastprompt.export import export
from fastprompt.export.tokens import _with_prompt
from fastprompt.models.generation import generate
from fastprompt.models.methods import keep_layers
from fastprompt.models.packed import PackedBackbone

WORDS_IN = 5 + len(WORDS)  # the tokenizer's
CLM = "AutoModelForCausalLM"
EXACT = dict(rtol=1e-10, atol=1e-10)


def written(made, directory):
    export(made, "tokens", directory)
    return load(directory, made.family, made.auto), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", dict(auto=CLM)),
        ("llama", dict(auto=CLM, model=dict(tie_word_embeddings=True))),
        ("llama", dict(auto=CLM, model=dict(vocab_size=48 + P))),  # rows to spare for all of the new tokens
        ("llama", dict(auto=CLM, num_layers=2, norms=True)),
        ("gemma3_text", dict(auto=CLM, max_length=5)),  # tied, scaled, capped
        ("phi3", dict(auto=CLM, max_length=3)),
        ("opt", dict(auto=CLM)),
        ("bert", {}),
        ("xlm-roberta", {}),
        ("electra", dict(model=dict(embedding_size=16))),
    ],
)
def test_the_text_is_read_as_behind_the_prompt(family, options, learner, tmp_path):
    made = learner(family, "prompt", **options)
    longest, prompted = made.inputs.max_length, made.adapted.prompted
    model, tokenizer = written(made, tmp_path / "out")
    stock = load(made.place, family, made.auto)
    if made.adapter.num_layers is not None:
        keep_layers(stock.base_model, made.adapter.num_layers)
    stock.load_state_dict(made.backbone.state_dict())
    read = []
    for text in TEXTS:
        ids = made.tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        new = tokenizer(text, truncation=True, max_length=longest + P)["input_ids"]
        assert new[P:] == ids and tokenizer.convert_ids_to_tokens(new[:P]) == [f"<|prompt_{n}|>" for n in range(P)]
        ids, new = torch.tensor([ids]), torch.tensor([new])
        read.append((ids, new))
        with torch.no_grad():
            rows = torch.cat([prompted.prompt.rows()[None], stock.get_input_embeddings()(ids)], 1)
            expected = stock(inputs_embeds=rows)[0][:, P:]  # as PEFT does it
            got = model(input_ids=new)[0][:, P:]
        torch.testing.assert_close(got[..., : expected.shape[-1]], expected, **EXACT)
    # And as a PromptModel does it, where norms of decoders do not round to float32: both packed, and nothing trains.
    made.backbone.requires_grad_(False)
    packed = PackedBackbone(model.requires_grad_(False).base_model)
    for ids, new in read:
        got = packed({"input_ids": new}).last_hidden_state[:, P:]
        torch.testing.assert_close(got, made.hidden(input_ids=ids).detach(), **EXACT)


WRITERS = [("llama", True, 0), ("llama", False, 1), ("llama", True, P), ("phi", False, 0)]  # the last: a head's bias


@pytest.mark.parametrize(("family", "tied", "spare"), WRITERS)
def test_the_new_tokens_are_never_written(family, tied, spare, learner, tmp_path, monkeypatch):
    """Each of those that the model had no row for is less likely than the average token, or impossible."""
    monkeypatch.setitem(CONFIGS, "phi", transformers.PhiConfig(**COMMON, num_attention_heads=4))
    made = learner(family, "prompt", auto=CLM, model={"vocab_size": WORDS_IN + spare, "tie_word_embeddings": tied})
    model, tokenizer = written(made, tmp_path / "out")
    new = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert not model.config.tie_word_embeddings and len(model.get_output_embeddings().weight) == WORDS_IN + P
    with torch.no_grad():
        logits = model(input_ids=new).logits
    known = WORDS_IN + spare
    assert (logits.softmax(-1)[..., known:] <= 1 / known).all()
    assert (logits[..., known:].amax(-1) < logits.amax(-1)).all() if spare < P else logits.shape[-1] == known
    assert family != "phi" or not logits.softmax(-1)[..., known:].any()
    assert (model.generation_config.suppress_tokens or []) == list(range(known, WORDS_IN + P))
    options = {"max_new_tokens": 6, "do_sample": False}
    got = model.generate(input_ids=new, **options)[0, P:]
    before = made.tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    assert (
        got.tolist() == generate(made.backbone, made.adapted.prompted.prompt_inputs(), **before, **options)[0].tolist()
    )


def test_generated_text_does_not_depend_on_the_batch(learner, tmp_path):
    made = learner("gemma3_text", "prompt", auto=CLM, max_length=5)
    model, tokenizer = written(made, tmp_path / "out")
    tokenizer.padding_side = "left"
    inputs = tokenizer(TEXTS[:2], padding=True, return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 3, "do_sample": False}
    together = model.generate(**inputs, **options)[:, -3:]
    alone = [model.generate(torch.tensor([tokenizer(text)["input_ids"]]), **options)[0, -3:] for text in TEXTS[:2]]
    assert together.tolist() == [each.tolist() for each in alone]


PROCESSORS = {
    "none": None,
    "template": processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    ),
    "begin alone": processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
    ),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 0)),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False),
    "bytes": processors.ByteLevel(trim_offsets=True),
    "llama 3": processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<s> $A", "<s> $A $B:1", [("<s>", 0)])]
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_prompt_stands_before_what_a_tokenizer_makes(name):
    """Ids, types of texts, offsets and the length that is cut to: those of before, behind the prompt."""
    vocabulary = {
        word: n for n, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<p0>", "<p1>", "Ġw1", "Ġw2", "Ġw3"])
    }
    before, after = (Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")) for _ in range(2))
    for tokenizer in (before, after):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
        if PROCESSORS[name] is not None:
            tokenizer.post_processor = PROCESSORS[name]
    about = json.loads(after.to_str())
    about["post_processor"] = _with_prompt(about["post_processor"], ["<p0>", "<p1>"], [4, 5])
    after = Tokenizer.from_str(json.dumps(about))
    for texts in (["w1 w2 w3"], ["w1 w2", "w3"]):
        old, new = before.encode(*texts), after.encode(*texts)
        assert (new.ids[:2], new.ids[2:]) == ([4, 5], old.ids)
        assert (new.type_ids[2:], new.offsets[2:], new.special_tokens_mask) == (
            *(old.type_ids, old.offsets),
            [1, 1, *old.special_tokens_mask],
        )
        before.enable_truncation(len(old.ids) - 1)
        after.enable_truncation(len(old.ids) + 1)
        assert after.encode(*texts).ids[2:] == before.encode(*texts).ids
        before.no_truncation()
        after.no_truncation()


def test_classes_that_make_their_own_processor(learner, tmp_path):
    """BERT's tokenizer leaves out what tokenizer.json says: then a plainer class is named."""
    made = learner("bert", "prompt")
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *WORDS]
    made.tokenizer = transformers.BertTokenizer({word: n for n, word in enumerate(words)})
    ids = made.tokenizer("w1 w2", truncation=True, max_length=4)["input_ids"]
    _, tokenizer = written(made, tmp_path / "out")
    assert tokenizer("w1 w2")["input_ids"] == [WORDS_IN, WORDS_IN + 1, WORDS_IN + 2, *ids]
    about = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert about["truncation"] is None and made.tokenizer("w1 w2")["input_ids"] == ids


def test_chat_templates_begin_with_the_prompt(learner, tmp_path):
    made = learner("llama", "prompt", auto=CLM)
    made.tokenizer.chat_template = "{%- for m in messages %}{{ m['content'] }} {% endfor %}"
    _, tokenizer = written(made, tmp_path / "out")
    chat = [{"role": "user", "content": "w1 w2"}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids == [
        WORDS_IN,
        WORDS_IN + 1,
        WORDS_IN + 2,
        *made.tokenizer("w1 w2", add_special_tokens=False)["input_ids"],
    ]
    text = tokenizer.decode(tokenizer("w1 w2")["input_ids"], skip_special_tokens=True)
    assert text == made.tokenizer.decode(made.tokenizer("w1 w2")["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("llama", "prefix", {}, "'tokens' are for method prompt, rows before the text: a prefix lives in every layer"),
        ("llama", "lora", {}, "'tokens' are for method prompt, rows before the text: this run has none"),
        ("llama", "prompt", dict(adapter_size=4), r"its adapters \(adapter_size\) are in no plain model"),
        ("gemma3_text", "prompt", dict(max_length=6), "'tokens' needs a max_length of at most 5 here"),
        ("gemma3n_text", "prompt", dict(max_length=3), "where tokens enter in every layer once more"),
    ],
)
def test_what_cannot_be_tokens(family, method, options, message, learner, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(learner(family, method, **options), "tokens", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_tokens_of_that_name_are_not_taken_over(learner, tmp_path):
    made = learner("bert", "prompt")
    made.tokenizer.add_tokens(["<|prompt_1|>"])
    with pytest.raises(ValueError, match=r"must not have the tokens that stand for a prompt, got '<\|prompt_1\|>'"):
        export(made, "tokens", tmp_path / "out")
