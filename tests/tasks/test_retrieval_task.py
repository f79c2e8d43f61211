"""The task of retrieval: what it finds, and scores of what it found."""

import json

import pytest
import torch
import transformers
from helpers import build, tokenizer_file, translations
from stock_model import StockModel

from fastprompt import tasks
from fastprompt.data.examples import Pair
from fastprompt.tasks.base import InputConfig
from fastprompt.tasks.retrieval import Retrieval, retrieval_scores, sentence_groups


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer_file().decode())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def test_predictions_and_scores(tokenizer):
    model, pairs = StockModel(build("bert"), tokenizer), translations(12)
    pairs[5] = Pair(pairs[2].source, pairs[5].target)  # the same sentence is no rival
    task = Retrieval()
    task.build(model.backbone, tokenizer, InputConfig())
    seen = []
    predictions = task.predict(model, pairs, on_batch=seen.append)
    sources, targets = (model.vectors([pair[side] for pair in pairs]).double() for side in (0, 1))
    cosines = torch.cosine_similarity(targets[:, None], sources[None], dim=-1)
    for n, got in enumerate(predictions):
        row = cosines[n].tolist()
        rivals = [row[m] for m in range(12) if pairs[m].source != pairs[n].source]
        assert row[got["prediction"]] == pytest.approx(max(row))
        assert got["score"] == pytest.approx(max(row)) and got["cosine"] == pytest.approx(row[n])
        assert got["rank"] == sum(rival >= row[n] for rival in rivals)
    groups = sentence_groups([tokenizer(pair.source)["input_ids"] for pair in pairs])
    assert len(set(groups.tolist())) < 12
    scores = task.scores(pairs, json.loads(json.dumps(predictions)))
    assert scores == pytest.approx(retrieval_scores(targets, sources, groups))
    assert seen == [12] and task.metric in scores


def test_nothing_of_it_is_trained(tokenizer):
    task = tasks.get("retrieval", **Retrieval().settings())
    task.build(build("bert"), tokenizer, InputConfig())
    assert task.encode(translations(3)) == [] and not list(task.parameters())
    assert task.predict(None, []) == []
    with pytest.raises(ValueError, match="examples and predictions must be equally many and not none, got 0 and 0"):
        task.scores([], [])


def test_rows():
    task = Retrieval()
    assert task.example({"source": "a", "target": "b"}, "f, row 1", 0) == Pair("a", "b")
    with pytest.raises(ValueError, match="f, row 1, target: must be a text, got ''"):
        task.example({"source": "a", "target": ""}, "f, row 1", 0)
    with pytest.raises(ValueError, match="f, row 1: no column 'source', only 'target'"):
        task.example({"target": "b"}, "f, row 1", 0)
