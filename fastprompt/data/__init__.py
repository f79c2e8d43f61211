"""Reading data: tables, SQuAD's form, CoNLL, parallel text; and making pseudo-data."""

from .examples import Answer, Pair, Question, Tagged, Text, Written
from .parallel import read_pairs, split_pairs
from .table import iter_examples, iter_rows, read_examples, read_rows

__all__ = [
    "Answer",
    "Pair",
    "Question",
    "Tagged",
    "Text",
    "Written",
    "iter_examples",
    "iter_rows",
    "read_examples",
    "read_pairs",
    "read_rows",
    "split_pairs",
]
