"""Labelled data made without labels: cloze questions, pairs of paraphrases, code-switched text."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from .examples import Answer, Pair, Question, Text
from .reading import check_count
from .words import Corpus, Unit, word_key, word_spans

# A full stop after a lone capital is an initial's.
_SENTENCE = re.compile(r"\S(?:.*?(?:(?<![\s.][A-Z])(?<!^[A-Z])[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？｡।۔؟።]+[”」』）]*)|.*)")
_CLAUSE_END = re.compile(r"[,;:，、；：،؛]+(?!\d)\s*|\s[–—-]+\s|\s*[()（）]\s*")
_FEWEST, _MOST = 5, 20  # words of a question besides the blank
_NEAR = 0.8  # sentences that share a greater part of their words may mean the same


def code_switch(text: str, lexicon: Mapping[str, str], fraction: float, rng: random.Random) -> str:
    """Put the lexicon's word for each word of `text` that has another one there, with probability `fraction`.

    A word with a capital is replaced by one with a capital; otherwise the lexicon's spelling stands.

    Args:
        lexicon: word in lower case -> word, such as `learn_lexicon` gives.

    Raises:
        ValueError: a fraction outside [0, 1].
    """
    return _replace(text, _switches(text, lexicon, fraction, rng))


def code_switch_question(
    question: Question, lexicon: Mapping[str, str], fraction: float, rng: random.Random
) -> Question:
    """Switch words of question and context as `code_switch` does; the answers are the spans they were, at new places.

    An answer's words may be switched with the context's. A word that an answer begins or ends within stays.

    Raises:
        ValueError: a fraction outside [0, 1], or an answer that the context does not have at its start.
    """
    for text, start in question.answers:
        if start < 0 or not question.context.startswith(text, start):
            raise ValueError(
                f"question {question.id}: answers must be spans of the context, "
                f"got {text!r} at {start}, where it has {question.context[max(0, start) :][: len(text)]!r}"
            )
    bounds = [(answer.start, answer.start + len(answer.text)) for answer in question.answers]
    switches = [
        (start, end, word)
        for start, end, word in _switches(question.context, lexicon, fraction, rng)
        if not any(start < bound < end for span in bounds for bound in span)
    ]

    def moved(place: int) -> int:
        return place + sum(len(word) - (end - start) for start, end, word in switches if end <= place)

    context = _replace(question.context, switches)
    answers = [Answer(context[moved(start) : moved(end)], moved(start)) for start, end in bounds]
    return Question(question.id, code_switch(question.question, lexicon, fraction, rng), context, answers)


def cloze_questions(passages: Sequence[str], count: int, seed: int, blank: str = "___") -> list[Question]:
    """Make questions of plain text, in the manner of unsupervised QA by cloze (Lewis et al., 2019).

    A number, a name or, in a script without capitals, a run of words that are rare in `passages` is the answer; the
    clauses of its sentence around it are the question, with a blank in its place. In half of the questions what
    follows the blank comes first.

    Args:
        passages: each becomes the context of its questions, as it is; several sentences make a harder task.
        count: how many questions to make; they are taken in turn from all passages.
        blank: what stands for the answer; perhaps the language's word for "what".

    Raises:
        ValueError: no passages, `count` below 1, or passages that do not give as many questions.
    """
    _check(passages, "passages", count)
    rng = random.Random(seed)
    corpus = Corpus(passages)
    waiting = [(passage, _clozes(passage, corpus, blank, rng)) for passage in dict.fromkeys(passages)]
    rng.shuffle(waiting)
    questions: list[Question] = []
    while waiting and len(questions) < count:
        still = []
        for passage, clozes in waiting:
            if len(questions) < count and (cloze := next(clozes, None)):
                text, answer = cloze
                questions.append(Question(f"cloze-{len(questions)}", text, passage, [answer]))
                still.append((passage, clozes))
        waiting = still
    if len(questions) < count:
        raise ValueError(
            f"count must be at most {len(questions)}, as many as could be made of {len(passages)} passages, got {count}"
        )
    return questions


def paraphrase_pairs(
    pairs: Sequence[Pair], count: int, seed: int, lexicon: Mapping[str, str] | None = None
) -> list[Text]:
    """Make sentence pairs that mean the same, label "1", or not, label "0", of parallel text; half of each.

    A sentence with its translation or, given a lexicon, with its own code-switched version is a positive example.
    For a negative one, one of the two gives way to its like of another meaning: alternately the sentence with two
    numbers, names or content words exchanged, after PAWS (Zhang et al., 2019), and the sentence of `pairs` that shares
    most words with it, rare ones foremost. Where the exchange can be made on both sides, sentences with it are in
    positive examples as often as in negative ones, so that the sentences, taken singly, do not tell the label.

    Args:
        pairs: parallel sentences; each gives at most one positive and one negative example, labels are ignored.
        count: how many examples to make; of an odd number, one more is positive.
        lexicon: source word in lower case -> target word, such as `learn_lexicon` gives.

    Raises:
        ValueError: no pairs, `count` below 1, or pairs that do not give as many examples.
    """
    _check(pairs, "pairs", count)
    rng = random.Random(seed)
    maker = _Couples(pairs, lexicon or {}, rng)
    examples: list[tuple[str, str, str]] = []
    order = list(range(len(pairs)))
    rng.shuffle(order)
    for index in order:
        if len(examples) >= count:
            break
        if couple := maker.couple(index):
            for label, two in zip("10", couple, strict=True):
                first, second = rng.sample(two, 2)
                examples.append((first, second, label))
    if len(examples) < count:
        raise ValueError(
            f"count must be at most {len(examples)}, as many as could be made of {len(pairs)} pairs, got {count}"
        )
    examples = examples[:count]
    rng.shuffle(examples)
    return [Text(f"pseudo-{number}", *example) for number, example in enumerate(examples)]


class _Couples:
    """Makes a positive and a negative example of a pair, each unlike all before."""

    def __init__(self, pairs: Sequence[Pair], lexicon: Mapping[str, str], rng: random.Random):
        self._pairs, self._lexicon, self._rng = pairs, lexicon, rng
        self._corpus = Corpus([pair.source for pair in pairs])
        self._seen: set[frozenset[str]] = set()
        self._made = Counter({self._exchanged: 0, self._nearest: 0})
        self._bags = [frozenset(word_key(pair.source[a:b]) for a, b in word_spans(pair.source)) for pair in pairs]
        self._having: dict[str, list[int]] = {}
        for index, bag in enumerate(self._bags):
            for word in bag:
                self._having.setdefault(word, []).append(index)
        # Integers, as sums of them do not depend on the order.
        self._weight = {
            word: round(1000 * math.log(1 + len(pairs) / len(having))) for word, having in self._having.items()
        }
        self._heavy = [sum(self._weight[word] for word in bag) for bag in self._bags]

    def couple(self, index: int) -> tuple[tuple[str, str], tuple[str, str]] | None:
        """A positive and a negative example, or None if none can be made of this pair."""
        for way in sorted(self._made, key=self._made.__getitem__):  # the kind there are fewer of
            other = way(index)
            if other is None:
                continue
            source, target = self._pairs[index][:2]
            changed, changed_target = other
            if self._lexicon and (changed_target is None or self._rng.random() < 0.5):
                fraction = self._rng.uniform(0.2, 0.8)
                switched, changed_switched = (
                    code_switch(text, self._lexicon, fraction, self._rng) for text in (source, changed)
                )
                if switched != source and changed_switched != changed:
                    target, changed_target = switched, changed_switched
            positive, negative = [(source, target)], [(changed, target)]
            if changed_target is not None:
                negative.append((source, changed_target))
                if way == self._exchanged:
                    positive.append((changed, changed_target))
            same, different = self._unseen(positive), self._unseen(negative)
            if same and different and {*same} != {*different}:
                self._seen |= {frozenset(same), frozenset(different)}
                self._made[way] += 1
                return same, different
        return None

    def _unseen(self, options: list[tuple[str, str]]) -> tuple[str, str] | None:
        self._rng.shuffle(options)
        return next((two for two in options if two[0] != two[1] and frozenset(two) not in self._seen), None)

    def _exchanged(self, index: int) -> tuple[str, str | None] | None:
        """The pair's sentence with two units exchanged and, if they are found there, its translation likewise."""
        source, target = self._pairs[index][:2]
        units = self._corpus.units(source)
        words = word_spans(source)
        choices = [
            (one, two)
            for number, one in enumerate(units)
            for two in units[number + 1 :]
            if one.kind == two.kind and self._differ(source, one, two) and _apart(words, units, one, two)
        ]
        choices = [two for two in choices if two[0].kind != "plain"] or choices
        if not choices:
            return None
        # Rather two that the translation has too.
        self._rng.shuffle(choices)
        for one, two in choices:
            there = [self._place(target, source[unit.start : unit.end]) for unit in (one, two)]
            if None not in there:
                first, second = sorted(there)
                if first[1] <= second[0]:  # else one is part of the other
                    return _exchange(source, one[:2], two[:2]), _exchange(target, first, second)
        one, two = choices[0]
        return _exchange(source, one[:2], two[:2]), None

    def _differ(self, text: str, one: Unit, two: Unit) -> bool:
        first, second = (word_key(text[unit.start : unit.end]) for unit in (one, two))
        return first != second and self._lexicon.get(first, first) != self._lexicon.get(second, second)

    def _place(self, target: str, unit: str) -> tuple[int, int] | None:
        """Where the translation has the unit: as it is or in the lexicon's word, and once."""
        words = word_spans(target)
        starts, ends = {start for start, _ in words}, {end for _, end in words}
        options = {unit, self._lexicon.get(word_key(unit), unit)}
        found = [
            each.span()
            for option in sorted(options)
            for each in re.finditer(re.escape(option), target)
            if each.start() in starts and each.end() in ends
        ]
        return found[0] if len(found) == 1 else None

    def _nearest(self, index: int) -> tuple[str, str] | None:
        """The pair whose sentence shares most words with this one's, by their weight, but not nearly all."""
        shared: Counter[int] = Counter()
        for word in sorted(self._bags[index]):
            for other in self._having[word]:
                shared[other] += self._weight[word]
        best, most = None, 0.0
        for other, both in shared.items():
            likeness = both / (self._heavy[index] + self._heavy[other] - both)
            if most < likeness <= _NEAR and self._pairs[other].target != self._pairs[index].target:
                best, most = other, likeness
        return None if best is None else self._pairs[best][:2]


def _clozes(passage: str, corpus: Corpus, blank: str, rng: random.Random) -> Iterator[tuple[str, Answer]]:
    """Questions on a passage, with their answers, in random order."""
    sentences = [found.span() for found in _SENTENCE.finditer(passage)]
    units = [unit for unit in corpus.units(passage) if unit.kind != "plain"]
    rng.shuffle(units)
    for start, end, _ in units:
        for first, last in sentences:
            if first <= start and end <= last:
                text = _cloze(passage[first:start], passage[end:last], blank, rng)
                # An answer that the question gives away is none.
                if text and word_key(passage[start:end]) not in word_key(text):
                    yield text, Answer(passage[start:end], start)


def _cloze(before: str, after: str, blank: str, rng: random.Random) -> str | None:
    """The clauses nearest to a blank between `before` and `after`, or None if they are but few words."""
    lefts = [found.end() for found in _CLAUSE_END.finditer(before)][::-1] + [0]
    rights = [found.start() for found in _CLAUSE_END.finditer(after)] + [len(after)]
    left, right = before[lefts.pop(0) :], after[: rights.pop(0)]
    fewest = rng.randint(_FEWEST, _MOST // 2)
    while lefts or rights:
        if len(word_spans(left)) + len(word_spans(right)) >= fewest:
            break
        if lefts and (not rights or rng.random() < 0.5):
            left = before[lefts.pop(0) :]
        else:
            right = after[: rights.pop(0)]
    words = word_spans(left)
    if len(words) > _MOST // 2:
        left = left[words[-_MOST // 2][0] :]
    words = word_spans(right)
    if len(words) > _MOST // 2:
        right = right[: words[_MOST // 2 - 1][1]]
    if len(word_spans(left)) + len(word_spans(right)) < _FEWEST:
        return None
    right = right.rstrip(" .!?…。！？｡।۔؟።")
    if left.strip() and rng.random() < 0.5:
        return f"{blank}{right}, {left.strip()}?"
    return f"{left}{blank}{right}?"


def _switches(text: str, lexicon: Mapping[str, str], fraction: float, rng: random.Random) -> list[tuple[int, int, str]]:
    """Start and end of the words to be replaced, in order, and what by."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    switches = []
    for start, end in word_spans(text):
        word = text[start:end]
        other = lexicon.get(word_key(word))
        if other is not None and word_key(other) != word_key(word) and rng.random() < fraction:
            switches.append((start, end, other[:1].title() + other[1:] if word[0].isupper() else other))
    return switches


def _replace(text: str, switches: Sequence[tuple[int, int, str]]) -> str:
    parts, done = [], 0
    for start, end, word in switches:
        parts += [text[done:start], word]
        done = end
    return "".join(parts) + text[done:]


def _exchange(text: str, one: tuple[int, int], two: tuple[int, int]) -> str:
    return _replace(text, [(*one, text[slice(*two)]), (*two, text[slice(*one)])])


def _apart(words: list[tuple[int, int]], units: list[Unit], one: Unit, two: Unit) -> bool:
    # "A and B" means what "B and A" does; two words that are no units must stand between.
    between = [word for word in words if one.end <= word[0] and word[1] <= two.start]
    inside = [word for word in between if any(unit.start <= word[0] and word[1] <= unit.end for unit in units)]
    return len(between) - len(inside) >= 2


def _check(texts: Sequence, name: str, count: int) -> None:
    if not texts:
        raise ValueError(f"{name} must hold at least one, got none")
    check_count("count", count)
