"""Pseudo-data for a study: labelled examples of a task, made of text without its labels."""

import random
from collections.abc import Sequence

from fastprompt.data.examples import Pair
from fastprompt.data.lexicon import learn_lexicon
from fastprompt.data.pseudo import cloze_questions, code_switch_question, paraphrase_pairs

from .config import StudyConfig

SWITCHED = 0.3  # of the words that the lexicon has


def pseudo_examples(config: StudyConfig, train: Sequence, pairs: Sequence[Pair], seed: int) -> list:
    """`config.pseudo_examples` examples.

    For question answering: cloze questions on the contexts of `train`, whose questions and answers are not read; where
    there is parallel text, every second one code-switched by a lexicon learnt from it. For pair classification:
    sentences of the parallel text with translations and hard negatives.
    """
    count = config.pseudo_examples
    lexicon = learn_lexicon(pairs) if pairs else {}
    if config.task == "pawsx":
        return paraphrase_pairs(pairs, count, seed, lexicon)
    questions = cloze_questions([question.context for question in train], count, seed)
    rng = random.Random(seed)
    return [
        code_switch_question(question, lexicon, SWITCHED, rng) if lexicon and n % 2 else question
        for n, question in enumerate(questions)
    ]
