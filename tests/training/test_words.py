"""The words by which a causal model says which class."""

import pytest
import torch
import transformers
from helpers import build, paraphrases

from fastprompt.training.tasks import Verbaliser


def of_words(words, merges=None, ended=False):
    """A tokenizer by byte pairs whose words begin with a mark, as sentencepiece's do."""
    from tokenizers import Tokenizer, models, normalizers, processors

    made = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, merges or [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if ended:
        ids = [("</s>", words.index("</s>"))]
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_words_that_begin_alike_alone_and_apart_where_they_are_asked_for():
    """And a special token that a tokenizer puts at the end is not what the answer follows."""
    words = ["<unk>", "</s>", "▁", "N", "o", "Y", "▁N", "▁No", "▁Y", "D", ":"]
    merges = [("▁", "N"), ("▁N", "o"), ("▁", "Y")]
    model = build("llama", "AutoModelForCausalLM", torch.float32)
    for ended in (False, True):
        made = Verbaliser(of_words(words, merges, ended), model, 200)
        table = model.get_output_embeddings().weight
        assert torch.equal(made.words, table[[words.index("▁No"), words.index("▁Y")]])
        (item,) = made.encode(paraphrases(1))
        assert item.ids[-1] == words.index(":")
    with pytest.raises(ValueError, match=r"words \(' No', ' Yes'\) apart .* got \[\['▁', .*\], \['▁', .*\]\]"):
        Verbaliser(of_words(words), model, 200)  # both begin with the mark
