"""Windows of long contexts: exact characters in every script, and the best span against two plain loops."""

import re
import unicodedata

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastprompt.data.examples import Answer, Question
from fastprompt.data.windows import Window, best_answers, windows

TEXTS = {
    "Latin": "Der Hof des Bauern in Łódź brannte 1912 nieder; die Familie Müller-Lüdenscheidt zog nach Čačak.",
    "Greek": "Ο θείος μου ψαρεύει στη Θεσσαλονίκη από το 1987, όταν ο Γιώργος έφυγε για την Αθήνα.",
    "Cyrillic": "Анна видела из деревни, как в 1905 году горел двор крестьянина Ивана Петровича Щукина.",
    "Arabic": "وُلِدَ الشاعر محمود درويش في قرية البروة عام ١٩٤١، وتوفي في مدينة هيوستن.",
    "Hebrew": "הַמְּשׁוֹרֵר חיים נחמן ביאליק נולד בשנת 1873 בכפר ראדי שבאוקראינה.",
    "Hindi": "मुंशी प्रेमचंद का जन्म 1880 में वाराणसी के निकट लमही गाँव में हुआ था।",
    "Thai": "ลุงของฉันจับปลาที่แม่น้ำเจ้าพระยาในกรุงเทพมหานครเมื่อปี พ.ศ. ๒๕๓๐",
    "Chinese": "鲁迅于一八八一年出生在浙江绍兴，原名周樟寿，后改名周树人。",
    "Japanese": "夏目漱石は1867年に江戸で生まれ、ロンドンへ留学した。",
    "Korean": "윤동주 시인은 1917년 북간도 명동촌에서 태어나 후쿠오카에서 죽었다.",
    "combining": "Le cafe\u0301 de Zoe\u0308 s\u2019appelle \u00ab A\u030angstro\u0308m \u00bb et vend du the\u0301 a\u0300 Ha\u0300 No\u0323\u0302i.",  # noqa: E501
    "emoji": "Ada 👩🏽‍🚀 flew to 🇯🇵 Tokyo with 👨‍👩‍👧‍👦 and ate 🍣🍣, then wrote 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ✍️ home.",
}  # fmt: skip


def _tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """One of the three kinds that models have, trained on TEXTS."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    options = dict(vocab_size=500, special_tokens=special, show_progress=False)
    if kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(**options, unk_token="<unk>")
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    made.train_from_iterator(TEXTS.values(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


KINDS = {kind: _tokenizer(kind) for kind in ("bytes", "unigram", "wordpiece")}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]


def ask(context: str, answer: str = "", question: str = "w?", id: str = "1") -> Question:
    return Question(id, question, context, [Answer(answer, context.index(answer))] if answer else [])


def words(text: str) -> list[Answer]:
    """Answers as data sets have them: runs between white space, without the punctuation around them."""
    return [Answer(found[0], found.start()) for found in re.finditer(r"[^\s.,;:。，、،«»\u2019]+", text)]


def oracle(found: list[Window]) -> list[torch.Tensor]:
    """Logits that know where the answer is; windows without it say little."""
    logits = []
    for window in found:
        scores = torch.full((len(window.ids), 2), -4.0)
        if window.answer is not None:
            scores[window.answer[0], 0] = scores[window.answer[1], 1] = 5.0
        logits.append(scores)
    return logits


@pytest.mark.parametrize("script", TEXTS)
def test_answers_come_back_in_every_script(tokenizer, script):
    text = TEXTS[script]
    context = " ".join([text, *(other for name, other in TEXTS.items() if name != script)][:3])
    questions = [Question(str(n), "w?", context, [answer]) for n, answer in enumerate(words(text))]
    found = windows(tokenizer, questions, max_length=200, stride=120)
    assert all(len(window.ids) <= 200 for window in found)
    rows = [window for window in found if window.answer is not None]
    assert {window.question for window in rows} == set(range(len(questions)))
    for window in rows:
        begin, end = (window.spans[row - window.first][n] for n, row in enumerate(window.answer))
        assert context[begin:end].strip() == questions[window.question].answers[0].text
    got = best_answers(questions, found, oracle(found), max_answer_tokens=120)
    assert [span.text for span in got] == [question.answers[0].text for question in questions]


@pytest.mark.parametrize("stride", [0, 7, 20])
def test_windows_cover_the_context_and_share_stride_tokens(tokenizer, stride):
    context = " ".join(TEXTS.values())
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    found = windows(tokenizer, [ask(context, question="Wer?"), ask("kurz")], max_length=48, stride=stride)
    pieces = [window for window in found if window.question == 0]
    assert [window.question for window in found[len(pieces) :]] == [1]
    ids, spans = [], []
    for number, window in enumerate(pieces):
        piece = window.ids[window.first : window.first + len(window.spans)]
        if number:
            assert piece[:stride] == ids[len(ids) - stride :]
        if window is not pieces[-1]:
            assert len(window.ids) == 48
        ids += piece[stride if number else 0 :]
        spans += window.spans[stride if number else 0 :]
    assert ids == whole["input_ids"]
    for (begin, end), (a, b) in zip(spans, whole["offset_mapping"], strict=True):
        assert begin == a and end >= b
        assert all(unicodedata.category(mark) in ("Mn", "Mc", "Me", "Cf") for mark in context[b:end])


def test_only_windows_with_the_whole_answer_have_it():
    context, answer = TEXTS["Latin"], "Familie Müller-Lüdenscheidt"
    found = windows(KINDS["unigram"], [ask(context, answer)], max_length=24, stride=10)
    begin = context.index(answer)
    for window in found:
        first, last = window.spans[0][0], window.spans[-1][1]
        assert (window.answer is not None) == (first <= begin and begin + len(answer) <= last)
    assert any(window.answer is None for window in found)
    misplaced = Question("1", "?", context, [Answer("Familie", 3)])
    assert all(window.answer is None for window in windows(KINDS["unigram"], [misplaced], 24, 5))


def test_long_questions_are_cut(tokenizer):
    """To half a window; but a character of several tokens, at the cut, stays whole."""
    question = TEXTS["emoji"] * 3
    found = windows(tokenizer, [ask(TEXTS["Latin"], question=question)], max_length=40, stride=5)
    asked = {tuple(window.ids[1 : window.first - 2]) for window in found}
    (asked,) = asked
    assert 18 <= len(asked) <= 20 + 4
    assert all(len(window.ids) <= 40 for window in found)
    limit = 40 - 4 - len(asked)
    assert windows(tokenizer, [ask(TEXTS["Latin"], question=question)], max_length=40, stride=limit - 1)
    with pytest.raises(ValueError, match=f"stride must be from 0 to below {limit}, .* got {limit}"):
        windows(tokenizer, [ask(TEXTS["Latin"], question=question)], max_length=40, stride=limit)


def test_prefix_text_stands_before_the_question(tokenizer):
    ids = [windows(tokenizer, [ask("ein Hof", question=text)], 40, 5, prefix)[0].ids
           for text, prefix in (("Wer ist Anna?", ""), ("ist Anna?", "Wer "))]  # fmt: skip
    assert ids[0] == ids[1]


def test_texts_without_tokens(tokenizer):
    questions = [ask("ein Hof", "Hof", question=""), ask("", question="Wer?", id="2"), ask(" ", question="", id="3")]
    found = windows(tokenizer, questions, max_length=20, stride=2)
    given_back = best_answers(questions, found, oracle(found))
    assert [span.text for span in given_back] == ["Hof", "", ""] and given_back[1].score is None
    assert windows(tokenizer, []) == [] and best_answers([], [], []) == []


def test_errors():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer must be a fast one, which knows characters, got Slow"):
        windows(Slow(), [ask("a")])
    for stride in (-1, 40, 400):
        with pytest.raises(ValueError, match=rf"stride must be from 0 to below \d+, .* got {stride}"):
            windows(KINDS["bytes"], [ask("a")], max_length=40, stride=stride)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_span_is_that_of_two_loops(data):
    count = data.draw(st.integers(1, 3))
    most = data.draw(st.integers(1, 6))
    questions = [ask("abcdefghij", id=str(n)) for n in range(count)]
    found, logits = [], []
    for question in range(count):
        for _ in range(data.draw(st.integers(1, 3))):
            begin, tokens = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
            first, after = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
            spans = [(n, n + 1) for n in range(begin, begin + tokens)]
            found.append(Window(question, [0] * (first + tokens + 1), first, spans, None))
            rows = first + tokens + 1 + after
            numbers = data.draw(st.lists(st.integers(-40, 40), min_size=2 * rows, max_size=2 * rows))
            logits.append(torch.tensor(numbers).view(rows, 2) / 4)
            logits[-1][0] += data.draw(st.integers(0, 16)) / 2  # of no answer: or else it is seldom the largest
    unanswerable = data.draw(st.booleans())
    expected: dict[int, tuple[float, set[str]]] = {}
    nothing: dict[int, float] = {}
    for window, scores in zip(found, logits, strict=True):
        n = window.question
        nothing[n] = min(nothing.get(n, 1e9), float(scores[0, 0] + scores[0, 1]))
        for a in range(len(window.spans)):
            for b in range(a, min(a + most, len(window.spans))):
                score = float(scores[window.first + a, 0] + scores[window.first + b, 1])
                best, texts = expected.get(n, (-1e9, set()))
                text = "abcdefghij"[window.spans[a][0] : window.spans[b][1]]
                texts = {text} if score > best else texts | {text} if score == best else texts
                expected[n] = max(score, best), texts
    got = best_answers(questions, found, logits, most, unanswerable)
    assert len(got) == count
    for n, span in enumerate(got):
        score, texts = expected.get(n, (None, {""}))
        if unanswerable and (score is None or nothing[n] > score):
            score, texts = nothing[n], {""}
        assert span.text in texts and span.score == score
