"""Question answering with a causal model: the answer is what it writes after the question."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastprompt.models.generation import evaluating, generate
from fastprompt.models.methods import AdaptedBackbone
from fastprompt.models.packed.layout import tensor_on
from fastprompt.ops import linear_cross_entropy
from fastprompt.tasks.metrics import answer_scores
from fastprompt.tasks.squad import Question

from .encoding import batch_of, without_end
from .tasks import Item, Task


class GeneratedAnswers(Task):
    """Trains on the words of the first answer, and predicts by writing greedily up to the end of the line.

    Args:
        tokenizer: transformers' tokenizer.
        model: the causal language model with its head, a constant here.
        metrics: "xquad" or "mlqa": whose rules score.
        max_length: tokens of an input with its answer. Of a context that is too long the end is cut.
        max_new_tokens: of an answer.
    """

    metric = "f1"

    def __init__(
        self, tokenizer: Callable, model: nn.Module, metrics: str, max_length: int, max_new_tokens: int = 32
    ) -> None:
        super().__init__()
        self.tokenizer, self.metrics = tokenizer, metrics
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self._model = (model,)  # no submodule: its weights are not the head's to train or to save

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def encode(self, examples: Sequence[Question]) -> list[Item]:
        items = []
        for n, question in enumerate(examples):
            for answer in question.exact_answers[:1]:
                end = self._ids(f" {answer.text}\n")
                if self.tokenizer.eos_token_id is not None:
                    end.append(self.tokenizer.eos_token_id)
                asked, cut = self._asked(question, len(end))
                ids = [*asked, *end]
                items.append(Item(ids, len(ids), len(end), n, cut))
        return items

    def _asked(self, question: Question, room: int) -> tuple[list[int], bool]:
        """Token ids of context and question that leave `room` for the answer, and whether the context is cut."""
        asked = self._ids(f"\nQuestion: {question.question}\nAnswer:")
        (context,) = without_end(self.tokenizer, [question.context])
        left = max(1, self.max_length - room - len(asked))
        return [*context[:left], *asked], len(context) > left

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def loss(self, hidden: Tensor, mask: Tensor, items: Sequence[Item]) -> Tensor:
        states, targets = [], []
        for row, item in zip(hidden, items, strict=True):
            length, answer = len(item.ids), item.target
            states.append(row[length - answer - 1 : length - 1])  # each row predicts the next token
            targets += item.ids[length - answer :]
        weight = self.model.get_output_embeddings().weight.detach()
        targets = tensor_on(targets, hidden.device)
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return linear_cross_entropy(torch.cat(states).to(weight.dtype), weight, targets, softcap=softcap) / len(targets)

    @torch.no_grad()
    def predict(self, model: AdaptedBackbone, examples: Sequence[Question], batch_size: int = 8) -> dict[str, str]:
        prompts = [self._asked(question, self.max_new_tokens)[0] for question in examples]
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        # The line's end by its tokens: transformers' stop_strings does not know every kind of tokenizer.
        lines = [self._ids("\n" * n) for n in (1, 2)]
        ends = [ids[0] for ids in (*lines, [self.tokenizer.eos_token_id]) if len(ids) == 1 and ids[0] is not None]
        # Every question has an answer: what is most likely to be a line's end at once is not to end it.
        options = {"max_new_tokens": self.max_new_tokens, "min_new_tokens": 1, "do_sample": False}
        options |= {"pad_token_id": self.tokenizer.pad_token_id or 0, "eos_token_id": ends or None}
        found, prompt_inputs = {}, None
        if model.prompted is not None:
            with evaluating(model.prompted):
                prompt_inputs = model.prompted.prompt_inputs()
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            inputs = batch_of([prompts[n] for n in chosen], next(model.parameters()).device)
            for name, rows in inputs.items():  # generate wants the padding on the left
                longest = rows.shape[1]
                lengths = [len(prompts[n]) for n in chosen]
                inputs[name] = torch.stack([row.roll(longest - n) for row, n in zip(rows, lengths, strict=True)])
            if prompt_inputs is None:
                written = self.model.generate(**inputs, **options)
            else:
                written = generate(self.model, prompt_inputs, **inputs, **options)
            texts = self.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
            for n, text in zip(chosen, texts, strict=True):
                found[examples[n].id] = text.strip().split("\n")[0].strip()
        return {question.id: found[question.id] for question in examples}

    def scores(self, examples: Sequence[Question], predictions: dict[str, str], language: str) -> dict[str, float]:
        return answer_scores(self.metrics, examples, predictions, language)
