"""Generation: a language model learns what to write after a prompt, or as a chat's last message."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastprompt._extras import require
from fastprompt.data.examples import Written
from fastprompt.data.reading import check_choice, check_count, shorten

from .base import InputConfig, Item, Model, Segments, Task, was_cut, without_end
from .metrics import check_equally_many
from .rows import id_in, is_missing, tell_cut, text_in
from .written import Writer, check_room, is_writer

METRICS = ("exact_match", "chrf", "bleu")


class Generation(Task):
    """Writing after a prompt; the loss is that of the completion's tokens and of the end of the text alone.

    Prompt and completion are joined as they are, with no space between them, and tokenized together, as TRL does it;
    where the prompt's own tokens are not those that they begin with then, because one would reach over the boundary,
    the completion is tokenized by itself: what is trained on begins with just what is given to predict with. A chat's
    messages go through the tokenizer's chat template, both with the last message and, with the beginning of an answer,
    without it. The end-of-text token follows where the template has none of those with which the model ends a text.

    Of a causal model's prompt that is too long the beginning is cut, of an encoder-decoder's the end; the completion
    never is.

    Args:
        max_new_tokens: the most tokens of a prediction.
        template: a text with {prompt} in it, where the prompt is put. None: the prompt stands alone.
        metric: the score that chooses the best checkpoint: "chrf", "bleu" or "exact_match". None: "chrf".

    Example:
        >>> task = Generation(template="{prompt} In Welsh: ")
        >>> task.example({"prompt": "Good morning.", "completion": "Bore da."}, "train.jsonl, line 1", 0)
        Written(id=0, prompt='Good morning.', completion='Bore da.')

    Raises:
        ValueError: a setting that is none of these.
    """

    name = "generation"
    columns = {
        "prompt": "what the model is given",
        "completion": "what it is to write",
        "messages": "instead of both: a list of {role, content}; the last one, of the assistant, is to be written",
        "id": "of the row",
    }
    labels = ("completion",)
    optional = ("id", "prompt", "completion", "messages")

    def __init__(self, max_new_tokens: int = 64, template: str | None = None, metric: str | None = None) -> None:
        super().__init__()
        check_count("max_new_tokens", max_new_tokens)
        if template is not None and (not isinstance(template, str) or "{prompt}" not in template):
            raise ValueError(f"template must be a text with {{prompt}} in it, got {shorten(template)}")
        check_choice("metric", metric or METRICS[1], METRICS)
        self.max_new_tokens, self.template, self.metric = max_new_tokens, template, metric or METRICS[1]
        self._writer: tuple[Writer, InputConfig] | None = None

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("max_new_tokens", "template", "metric")}

    def example(self, row: Mapping[str, Any], where: str, number: int, *, labelled: bool = True) -> Written:
        id, prompt = id_in(row, number), row.get("prompt")
        if not is_missing(row.get("messages")):
            return Written(id, *_messages(row["messages"], f"{where}, messages", labelled))
        if not isinstance(prompt, str):
            raise ValueError(f"{where}, prompt: must be a text, or there must be messages, got {shorten(prompt)}")
        if not labelled and is_missing(row.get("completion")):
            return Written(id, prompt)
        return Written(id, prompt, text_in(row, "completion", where))

    def build(self, backbone: nn.Module, tokenizer: Callable, inputs: InputConfig) -> None:
        if not is_writer(backbone):
            raise ValueError(
                "generation needs a causal language model or an encoder-decoder with its head, got "
                f"{type(backbone).__name__}"
            )
        writer = Writer(backbone, tokenizer)
        check_room(writer, inputs, self.max_new_tokens)
        self._writer, self.own_pass = (writer, inputs), writer.own_pass

    @property
    def writer(self) -> Writer:
        return self._writer[0]

    @property
    def inputs(self) -> InputConfig:
        return self._writer[1]

    def encode(self, examples: Sequence[Written]) -> list[Item]:
        """Inputs of examples with a completion; none where there is no room for it beside a token of the prompt."""
        items = []
        for n, example in enumerate(examples):
            if example.completion is None:
                continue
            prompt, cut = self._prompt(example)
            if self.writer.is_encoder_decoder:
                items.append(Item(prompt, len(prompt), self.writer.target(example.completion), n, cut))
                continue
            end = self._completion(example, prompt)
            prompt, cut = self._shortened(prompt, self.inputs.max_length - len(end))
            if prompt:
                ids = [*prompt, *end]
                items.append(Item(ids, len(ids), len(end), n, cut))
        return items

    def _prompt(self, example: Written) -> tuple[list[int], bool]:
        """The prompt's tokens, of a causal model all of them, and whether something is cut."""
        tokenizer, before = self.writer.tokenizer, self.inputs.prefix_text
        if not isinstance(example.prompt, str):
            self._check_chat(example)
            return self._chat(example.prompt, add_generation_prompt=True), False
        text = before + self._framed(example)
        if self.writer.is_encoder_decoder:
            encoded = tokenizer([text], truncation=True, max_length=self.inputs.max_length)
            return list(encoded["input_ids"][0]), was_cut(encoded, 0)
        (ids,) = without_end(tokenizer, [text])
        start = next((id for id in (tokenizer.bos_token_id, *self.writer.ends) if id is not None), None)
        if not ids and start is None:
            raise ValueError(f"prompt must have a token, got none in that of example {example.id!r}")
        return ids or [start], False  # after nothing at all nothing can be predicted

    def _framed(self, example: Written) -> str:
        return example.prompt if self.template is None else self.template.replace("{prompt}", example.prompt)

    def _completion(self, example: Written, prompt: list[int]) -> list[int]:
        """The tokens to be written after the prompt's, up to the end of the text."""
        if isinstance(example.prompt, str):
            text = self.inputs.prefix_text + self._framed(example) + example.completion
            (whole,) = without_end(self.writer.tokenizer, [text])
        else:
            whole = self._chat([*example.prompt, {"role": "assistant", "content": example.completion}])
        is_prefix = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        return self.writer.ended(whole[len(prompt) :] if is_prefix else self.writer.ids(example.completion))

    def _shortened(self, prompt: list[int], room: int) -> tuple[list[int], bool]:
        """The end of a prompt, and before it the token that begins a text, if it has one; and whether it was cut."""
        if len(prompt) <= room:
            return prompt, False
        start = prompt[:1] if prompt[0] == self.writer.tokenizer.bos_token_id and room > 1 else []
        return start + prompt[len(prompt) - max(room - len(start), 0) :], True

    def _check_chat(self, example: Written) -> None:
        tokenizer = self.writer.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"messages need a tokenizer with a chat template, got {type(tokenizer).__name__} without one, in "
                f"example {example.id!r}: give prompt and completion instead"
            )
        for name, value in (("prefix_text", self.inputs.prefix_text), ("template", self.template)):
            if value:
                raise ValueError(f"{name} is put around a prompt and must not be given with messages, got {value!r}")

    def _chat(self, messages: Sequence[dict], **options) -> list[int]:
        return list(self.writer.tokenizer.apply_chat_template(list(messages), return_dict=False, **options))

    def count(self, item: Item) -> int:
        return self.writer.count(item)

    def loss(self, segments: Segments, items: Sequence[Item]) -> Tensor:
        return self.writer.loss(segments, items)

    def loss_alone(self, model: Model, items: Sequence[Item]) -> Tensor:
        return self.writer.loss_alone(model, items)

    def predict(
        self,
        model: Model,
        examples: Sequence[Written],
        batch_size: int = 32,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """ "prediction": what the model writes after each prompt, without special tokens and the space around it."""
        room, items = self.inputs.max_length - self.max_new_tokens, []
        for n, example in enumerate(examples):
            prompt, cut = self._prompt(example)
            if not self.writer.is_encoder_decoder:
                prompt, cut = self._shortened(prompt, room)
            items.append(Item(prompt, len(prompt), example=n, cut=cut))
        tell_cut(items, self.inputs.max_length, len(examples))
        texts = self.writer.write(model, items, self.max_new_tokens, batch_size, on_batch)
        return [{"prediction": text.strip()} for text in texts]

    def scores(
        self, examples: Sequence[Written], predictions: Sequence[dict], language: str = "en"
    ) -> dict[str, float]:
        """ "exact_match", "chrf" and "bleu", 0 to 100; the latter two are sacrebleu's, of the whole corpus."""
        sacrebleu = require("sacrebleu", "train")
        check_equally_many("examples", examples, predictions)
        unknown = next((example for example in examples if example.completion is None), None)
        if unknown is not None:
            raise ValueError(f"examples must have a completion to be scored, {unknown.id!r} has none")
        texts = [prediction["prediction"].strip() for prediction in predictions]
        truth = [example.completion.strip() for example in examples]
        tokenize = "zh" if language == "zh" else "13a"  # as sacrebleu would have it for a pair of languages
        return {
            "exact_match": 100.0 * sum(map(str.__eq__, texts, truth)) / len(truth),
            "chrf": sacrebleu.corpus_chrf(texts, [truth]).score,
            "bleu": sacrebleu.corpus_bleu(texts, [truth], tokenize=tokenize).score,
        }


def _messages(value: Any, where: str, labelled: bool) -> tuple[list[dict], str | None]:
    """The messages before an answer, and the answer, which is the last one, of the assistant."""
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where}: must be a list of {{role, content}}, got {shorten(value)}")
    messages = []
    for n, each in enumerate(value):
        parts = [each.get(name) for name in ("role", "content")] if isinstance(each, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where}: must have role and content, two texts, got {shorten(each)} as number {n}")
        messages.append(dict(zip(("role", "content"), parts, strict=True)))
    if messages[-1]["role"] != "assistant":
        if labelled:
            raise ValueError(f"{where}: must end with one of the assistant, got {shorten(messages[-1])} as the last")
        return messages, None
    if len(messages) == 1:
        raise ValueError(f"{where}: must have others before the assistant's last one, got that one alone")
    return messages[:-1], messages[-1]["content"]
