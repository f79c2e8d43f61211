"""Generation against stock transformers: the loss of what is to be written, and what is written."""

import json

import pytest
import torch
from encoder_decoders import build_seq2seq
from helpers import build
from stock_model import StockModel, loss_without_values
from stock_writer import Asked, stock_loss, word_tokenizer
from tokenizers import processors

from fastprompt.data.examples import Written
from fastprompt.tasks.base import InputConfig
from fastprompt.tasks.generation import Generation

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }}{{ ' w3 ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)
EXAMPLES = [Written(0, "w5 w6 w7", " w8 w9"), Written("b", "w4", " w5"), Written(2, "w10 w11 w12 w13 w14", " w1 w2 w3")]


def made(backbone, tokenizer=None, max_length=40, prefix_text="", **settings) -> Generation:
    task = Generation(**({"max_new_tokens": 6} | settings))
    task.build(backbone, tokenizer or word_tokenizer(), InputConfig(max_length=max_length, prefix_text=prefix_text))
    return task


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite", "cohere"])
def test_loss_and_gradients_are_those_of_transformers(family):
    backbone = build(family, "AutoModelForCausalLM").requires_grad_(False)
    backbone.get_input_embeddings().weight.requires_grad_(True)  # for a gradient there must be one that wants it
    task = made(backbone)
    items = task.encode(EXAMPLES)
    counts = [task.count(item) for item in items]
    assert counts == [3, 2, 4] and not task.own_pass and not list(task.parameters())
    expected, gradient = stock_loss(backbone, items, counts)
    with torch.no_grad():
        segments = StockModel(backbone)(items)
    for trains in (False, True):  # a head that is the embeddings, and trains, has a gradient of its own
        head = backbone.get_output_embeddings().requires_grad_(trains)
        is_tied = head.weight is backbone.get_input_embeddings().weight
        hidden = segments.hidden.clone().requires_grad_(True)
        loss = task.loss(segments._replace(hidden=hidden), items)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-9)
        wanted = [hidden, head.weight] if trains and is_tied else [hidden]
        found = torch.autograd.grad(loss, wanted)
        torch.testing.assert_close(found[0][: len(gradient)], gradient, rtol=1e-9, atol=1e-12)
        assert found[0][len(gradient) :].abs().sum() == 0 and all(each.abs().sum() > 0 for each in found)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_loss_reads_nothing_of_its_device(family):
    """Nor does that of a head that is the embeddings, and trains."""
    task = made(build(family, "AutoModelForCausalLM", torch.float32))
    assert loss_without_values(task, task.encode(EXAMPLES), 48).dtype == torch.float32


def test_a_head_with_a_bias_is_run_by_the_model():
    backbone = build("llama", "AutoModelForCausalLM")
    backbone.lm_head = torch.nn.Linear(48, 61, bias=True, dtype=torch.float64)
    task = made(backbone)
    items = task.encode(EXAMPLES)
    assert task.own_pass
    backbone.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    expected, _ = stock_loss(backbone, items, [task.count(item) for item in items])
    loss = task.loss_alone(StockModel(backbone), items).detach()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)  # transformers' is float32


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders(family):
    config = {"num_decoder_layers": 3} if family == "t5" else {}  # transformers writes with as many as the encoder has
    backbone, tokenizer = build_seq2seq(family, **config), word_tokenizer()
    if family == "bart":
        backbone.generation_config.forced_bos_token_id = 7  # as that of a language
    task, model = made(backbone, tokenizer), Asked(backbone)
    items = task.encode(EXAMPLES)
    assert task.own_pass and [task.count(item) for item in items] == [4, 3, 5]
    expected, written = 0, []
    for example in EXAMPLES:
        ids = tokenizer([example.prompt], return_tensors="pt")["input_ids"]
        labels = tokenizer(text_target=[example.completion], return_tensors="pt")["input_ids"]
        expected += backbone(input_ids=ids, labels=labels).loss * labels.numel()
        ids = backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        written.append({"prediction": tokenizer.decode(ids[0], skip_special_tokens=True)})
    torch.testing.assert_close(task.loss_alone(model, items), expected, rtol=1e-9, atol=1e-9)
    assert task.predict(model, EXAMPLES, batch_size=2) == written and any(each["prediction"] for each in written)
    masks = [asked["attention_mask"] for asked in model.asked]  # an encoder's positions begin at the left
    assert all(mask[:, 0].all() for mask in masks) and not masks[0].all()
    (item,) = made(backbone, tokenizer, max_length=4).encode(EXAMPLES[2:])
    assert tokenizer.decode(item.ids) == "<s> w10 w11 </s>" and item.cut and len(item.target) == 5


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_predictions_are_those_of_generate(family):
    backbone, tokenizer = build(family, "AutoModelForCausalLM"), word_tokenizer()
    task, told, expected = made(backbone, tokenizer), [], []
    for example in EXAMPLES:
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"][:-1]])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": task.writer.ends, "pad_token_id": 1}
        written = backbone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        expected.append({"prediction": tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)})
    assert task.predict(StockModel(backbone), EXAMPLES, 2, told.append) == expected and told == [2, 1]
    assert any(each["prediction"] for each in expected)


def test_a_text_ends_whatever_its_tokenizer_adds():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    end = [*tokenizer.convert_tokens_to_ids(["w8", "w9"]), 2]
    (item,) = made(build_seq2seq("t5"), tokenizer).encode(EXAMPLES[:1])
    assert item.target == end
    (item,) = made(build("llama", "AutoModelForCausalLM"), tokenizer).encode(EXAMPLES[:1])
    assert item.target == 3 and item.ids[-3:] == end


class Scripted:
    """Writes given tokens, whatever it is asked."""

    def __init__(self, *rows):
        self.rows = torch.tensor(rows)

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, self.rows], 1)


def test_what_follows_the_end_is_not_read():
    tokenizer = word_tokenizer()
    words = tokenizer.convert_tokens_to_ids(["w7", "w8"])
    task = made(build("llama", "AutoModelForCausalLM"), tokenizer)
    model = Scripted([words[0], 2, words[1]], [words[1], words[0], words[0]])
    assert task.predict(model, EXAMPLES[:2]) == [{"prediction": "w8 w7 w7"}, {"prediction": "w7"}]  # the shorter first


def test_prompt_and_completion_are_joined_on_a_token_s_bound():
    tokenizer = word_tokenizer()
    task = made(build("llama", "AutoModelForCausalLM"), tokenizer, prefix_text="w9 ", template="w8 {prompt}")
    whole, apart = task.encode([Written(0, "w1", " w2 w3"), Written(1, "w1", "2 w3")])
    assert tokenizer.decode(whole.ids) == "<s> w9 w8 w1 w2 w3 </s>" and whole.target == 3
    assert tokenizer.decode(apart.ids) == "<s> w9 w8 w1 <unk> w3 </s>" and apart.target == 3  # and not w12
    (empty,) = made(build("llama", "AutoModelForCausalLM"), tokenizer).encode([Written(0, "", "w4")])
    assert tokenizer.decode(empty.ids) == "<s> w4 </s>"


def test_the_beginning_of_a_long_prompt_is_cut():
    tokenizer, model = word_tokenizer(), build("llama", "AutoModelForCausalLM")
    task = made(model, tokenizer, max_length=7, max_new_tokens=3)
    long = Written(0, "w1 w2 w3 w4 w5 w6 w7 w8", " w9")
    (item,) = task.encode([long])
    assert tokenizer.decode(item.ids) == "<s> w5 w6 w7 w8 w9 </s>" and item.cut and item.target == 2
    assert [each.cut for each in task.encode(EXAMPLES[:2])] == [False, False]
    assert task.encode([Written(0, "w1", "w2 " * 9), Written(1, "w1", None)]) == []  # it is not cut, so has no room
    stock = Asked(model)
    task.predict(stock, [long])
    assert tokenizer.decode(stock.asked[0]["input_ids"][0]) == "<s> w6 w7 w8"
    with pytest.raises(ValueError, match="max_new_tokens must be below max_length, 7, .* got 7"):
        made(model, tokenizer, max_length=7, max_new_tokens=7)


def test_chats():
    tokenizer, backbone = word_tokenizer(), build("llama", "AutoModelForCausalLM")
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    chat = messages + [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]
    task = made(backbone, tokenizer)
    example = task.example({"messages": chat}, "a.jsonl, row 4", 4)
    assert example == Written(4, chat[:3], "w8")
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template, got .* in example 4"):
        task.encode([example])
    tokenizer.chat_template = TEMPLATE
    (item,) = task.encode([example])
    assert tokenizer.decode(item.ids) == "<s> w1 w5 w3 w2 w6 w3 w1 w7 w3 w2 w8 w3 </s>"
    assert item.target == 3  # the answer, the template's own end, and the text's, which the template has not
    tokenizer.chat_template = TEMPLATE.replace("' w3 '", "' </s> '")
    (item,) = task.encode([example])
    assert tokenizer.decode(item.ids[-2:]) == "w8 </s>" and item.target == 2
    tokenizer.chat_template = TEMPLATE.replace("{{ 'w2 ' }}", "{{ 'w2 w40 ' }}")  # a prompt that is none of the whole's
    (item,) = task.encode([example])
    assert tokenizer.decode(item.ids[-4:]) == "w2 w40 w8 </s>" and item.target == 2
    stock = Asked(backbone)
    task.predict(stock, [example])
    assert stock.asked[0]["input_ids"][0].tolist() == item.ids[:-2]
    for name, value in (("template", "w3 {prompt}"), ("prefix_text", "w3 ")):
        with pytest.raises(ValueError, match=f"{name} .* must not be given with messages"):
            made(backbone, tokenizer, **{name: value}).encode([example])


def test_examples():
    task = Generation()
    assert task.example({"prompt": "a", "completion": "b", "id": 7}, "x", 0) == Written(7, "a", "b")
    assert task.example({"prompt": "a", "completion": "", "id": ""}, "x", 3, labelled=False) == Written(3, "a")
    user = {"role": "user", "content": "a"}
    assert task.example({"messages": [user]}, "x", 1, labelled=False) == Written(1, [user])
    for row, error in (
        ({"prompt": 3, "completion": "b"}, "x, row 1, prompt: must be a text, or there must be messages, got 3"),
        ({"prompt": "a", "completion": " "}, "x, row 1, completion: must be a text, got ' '"),
        ({"messages": []}, r"x, row 1, messages: must be a list of {role, content}, got \[\]"),
        ({"messages": [user]}, "messages: must end with one of the assistant, got .*'user'.* as the last"),
        ({"messages": [user, {"role": "assistant"}]}, "must have role and content, two texts, got .* as number 1"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "must have others before the assistant's last one, got that one alone",
        ),
    ):
        with pytest.raises(ValueError, match=error):
            task.example(row, "x, row 1", 1)


def test_settings():
    task = Generation(5, "to {prompt}", "bleu")
    assert Generation(**json.loads(json.dumps(task.settings()))).settings() == task.settings()
    assert task.metric == "bleu" and Generation().metric == "chrf"
    for settings, error in (
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"template": "to"}, "template must be a text with {prompt} in it, got 'to'"),
        ({"metric": "rouge"}, "metric must be one of exact_match, chrf, bleu, got 'rouge'"),
    ):
        with pytest.raises(ValueError, match=error):
            Generation(**settings)
    with pytest.raises(ValueError, match="generation needs a causal language model .*, got BertModel"):
        made(build("bert"))


def test_scores():
    sacrebleu = pytest.importorskip("sacrebleu")
    truth = ["the old mill by the river is gone", "a new stone bridge stands here"]
    examples = [Written(n, "", text) for n, text in enumerate(truth)]
    texts = ["the old mill by the river was gone", " a new stone bridge stands here"]
    scores = Generation().scores(examples, [{"prediction": text} for text in texts])
    assert scores["exact_match"] == 50 and 60 < scores["bleu"] < 100
    texts = [text.strip() for text in texts]
    assert scores["chrf"] == sacrebleu.corpus_chrf(texts, [truth]).score
    assert scores["bleu"] == sacrebleu.corpus_bleu(texts, [truth]).score
    chinese = [Written(0, "", "我的朋友在这里看书")]
    assert Generation().scores(chinese, [{"prediction": "我的朋友在那里看书"}], "zh")["bleu"] > 30
    with pytest.raises(ValueError, match="examples must have a completion to be scored, 3 has none"):
        Generation().scores([Written(3, "")], [{"prediction": ""}])
    with pytest.raises(ValueError, match="equally many and not none, got 1 and 0"):
        Generation().scores(examples[:1], [])
