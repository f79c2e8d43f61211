"""Answers that a causal model writes: what it is trained on, and what it says."""

import pytest
import torch
from helpers import save_backbone

from fastprompt.tasks.squad import Answer, Question
from fastprompt.training.encoding import batch_of, load_backbone
from fastprompt.training.generated import GeneratedAnswers
from fastprompt.training.task_config import TaskConfig
from fastprompt.training.task_learner import TaskLearner
from fastprompt.training.task_loop import train_task


def ask(number, question, context, answer):
    return Question(str(number), question, context, [Answer(answer, context.index(answer))])


QUESTIONS = [ask(0, "w1 w2", "w3 w4 w5 w6 w7", "w5 w6"), ask(1, "w8", "w9 w10 w11", "w9")]


@pytest.fixture
def causal(tmp_path):
    model, tokenizer = load_backbone(str(save_backbone("llama", tmp_path, "AutoModelForCausalLM")), causal_head=True)
    tokenizer.add_special_tokens({"eos_token": "</s>"})  # the attribute alone would not make it special
    return model, tokenizer


def test_loss_is_the_causal_model_s(causal):
    model, tokenizer = causal
    task = GeneratedAnswers(tokenizer, model, "xquad", max_length=40)
    items = task.encode(QUESTIONS)
    assert [item.target for item in items] == [3, 2]  # words of the answer, and the end
    assert not list(task.parameters()) and not task.state_dict()
    inputs = batch_of([item.ids for item in items], "cpu")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, item in enumerate(items):
        labels[row, len(item.ids) - item.target : len(item.ids)] = torch.tensor(item.ids[-item.target :])
    hidden = model.base_model(**inputs).last_hidden_state
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(task.loss(hidden, inputs["attention_mask"], items), expected, rtol=1e-5, atol=1e-6)


def test_a_long_context_leaves_room(causal):
    model, tokenizer = causal
    task = GeneratedAnswers(tokenizer, model, "xquad", max_length=12)
    long = ask(2, "w1", " ".join(f"w{n}" for n in range(2, 40)), "w2")
    (item,) = task.encode([long])
    assert len(item.ids) == 12 and item.ids[-2] == tokenizer.convert_tokens_to_ids("w2")
    assert item.ids[-item.target - 4 : -item.target] == task._ids("\nQuestion: w1\nAnswer:")[-4:]


@pytest.mark.parametrize("method", ["prefix", "lora"])
def test_learns_to_write_the_answers(causal, method):
    model, tokenizer = causal
    settings = {"steps": 150, "batch_size": 2, "lr": 0.2, "weights_lr": 0.03, "evaluate_every": 150, "max_length": 60}
    config = TaskConfig(task="xquad", method=method, num_virtual_tokens=8, **settings)
    learner, records = train_task(model, tokenizer, QUESTIONS, QUESTIONS, config)
    assert records[-1]["loss"] < 0.2 < records[0]["loss"]
    assert learner.predict(QUESTIONS) == {"0": "w5 w6", "1": "w9"}
    assert learner.task.scores(QUESTIONS, learner.predict(QUESTIONS), "en") == {"exact_match": 100.0, "f1": 100.0}


@pytest.mark.parametrize("method", ["prefix", "lora"])
def test_an_answer_is_never_empty(causal, method):
    """The end is the likeliest from the beginning, and w7 the likeliest word."""
    model, tokenizer = causal
    likely = torch.zeros(model.config.vocab_size)
    likely[tokenizer.eos_token_id], likely[tokenizer.convert_tokens_to_ids("w7")] = 2e3, 1e3
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + likely)
    learner = TaskLearner(model, tokenizer, TaskConfig(task="xquad", method=method, max_length=60))
    assert learner.predict(QUESTIONS) == {"0": "w7", "1": "w7"}
