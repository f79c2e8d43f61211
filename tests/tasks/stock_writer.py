"""What the tests of tasks that write share: a tokenizer of one token a word, and the loss by transformers."""

import torch
import transformers
from helpers import tokenizer_file
from stock_model import StockModel

from fastprompt.tasks.base import Segments


class Asked(StockModel):
    """One that keeps what it was asked to write."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.asked = []

    def generate(self, **inputs):
        self.asked.append(inputs)
        return super().generate(**inputs)


def packed(rows) -> Segments:
    """Hidden states of inputs as one; behind the last there is NaN, which nobody may read."""
    hidden = torch.cat([*rows, torch.full_like(rows[0][:3], torch.nan)])
    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + len(row))
    return Segments(hidden, torch.tensor(bounds, dtype=torch.int32), bounds)


def word_tokenizer(**special) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_file().decode()), unk_token="<unk>", pad_token="<pad>"
    )
    # Not as arguments alone: that would not make them special.
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"} | special)
    return tokenizer


def stock_loss(backbone, items, counts):
    """The sum of the losses of the last tokens of each input, by transformers, and its gradient for the hidden states.

    Each input by itself, without padding; and from the logits: the model's own loss is float32.
    """
    total, gradients = 0, []
    for item, count in zip(items, counts, strict=True):
        ids, kept = torch.tensor(item.ids), []
        hook = backbone.base_model.register_forward_hook(lambda *args, kept=kept: kept.append(args[2][0]))
        logits = backbone(input_ids=ids[None], use_cache=False).logits[0]
        hook.remove()
        labels = ids.masked_fill(torch.arange(len(ids)) < len(ids) - count, -100)
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        gradients.append(torch.autograd.grad(loss, kept[0])[0][0])
        total = total + loss.detach()
    return total, torch.cat(gradients)
