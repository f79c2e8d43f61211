"""Retrieval scores against a loop over plain Python numbers, and ties that must not flatter."""

import math

import pytest
import torch

from fastprompt.tasks import retrieval
from fastprompt.tasks.retrieval import firsts, retrieval_scores, sentence_groups


def looped(queries: list[list[float]], targets: list[list[float]], groups: list[int]) -> dict[str, float]:
    def cosine(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    found, own = {1: 0, 5: 0}, []
    for n, query in enumerate(queries):
        own.append(cosine(query, targets[n]))
        rivals = [cosine(query, target) for m, target in enumerate(targets) if groups[m] != groups[n]]
        for k in found:
            found[k] += sum(rival >= own[n] for rival in rivals) < k
    return {"r@1": found[1] / len(own), "r@5": found[5] / len(own), "cosine": math.fsum(own) / len(own)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("count", "width", "rows"), [(1, 1, 1024), (7, 3, 3), (97, 6, 32)])
def test_against_a_loop(monkeypatch, device, dtype, count, width, rows):
    monkeypatch.setattr(retrieval, "_ROWS", rows)
    targets = torch.randn(count, width, device=device)
    queries = (targets + torch.randn_like(targets)).to(dtype) * 3
    targets = targets.to(dtype)
    groups = torch.randint(count, (count,))
    for given in (None, groups):
        expected = looped(queries.tolist(), targets.tolist(), list(range(count)) if given is None else groups.tolist())
        assert retrieval_scores(queries, targets, given) == pytest.approx(expected, abs=1e-9)


def test_each_query_finds_its_own():
    vectors = torch.randn(11, 32)
    assert retrieval_scores(5 * vectors, vectors) == pytest.approx({"r@1": 1.0, "r@5": 1.0, "cosine": 1.0})
    assert retrieval_scores(vectors, vectors.roll(1, 0))["r@1"] == 0.0


@pytest.mark.parametrize("width", [1, 31, 384])
def test_what_cannot_be_told_apart_scores_nothing(width):
    same = torch.randn(1, width).expand(9, width)
    assert retrieval_scores(same, same) == pytest.approx({"r@1": 0.0, "r@5": 0.0, "cosine": 1.0})
    zero = torch.zeros(9, width)
    assert retrieval_scores(torch.randn(9, width), zero) == {"r@1": 0.0, "r@5": 0.0, "cosine": 0.0}


def test_a_sentence_given_twice_is_no_rival_of_itself_in_a_group():
    vectors = torch.randn(6, 64)
    vectors[4] = vectors[1]
    assert retrieval_scores(vectors, vectors)["r@1"] == pytest.approx(4 / 6)
    assert retrieval_scores(vectors, vectors, torch.tensor([0, 1, 2, 3, 1, 5]))["r@1"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_not_finite(bad, which):
    vectors = [torch.randn(4, 3), torch.randn(4, 3)]
    vectors[which][2, 1] = bad
    with pytest.raises(ValueError, match=f"{('queries', 'targets')[which]} must be finite.* 1 of 4 rows"):
        retrieval_scores(*vectors)


@pytest.mark.parametrize(
    ("queries", "targets", "groups", "error", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), None, ValueError, r"alike, got \(4, 3\) and \(4, 2\)"),
        (torch.zeros(4, 3), torch.zeros(5, 3), None, ValueError, "alike"),
        (torch.zeros(4), torch.zeros(4), None, ValueError, r"queries must have shape \(N, D\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), None, ValueError, "N > 0"),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), None, TypeError, "targets must be floating point"),
        (torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(3), ValueError, r"groups must have shape \(4,\)"),
    ],
)
def test_errors(queries, targets, groups, error, message):
    with pytest.raises(error, match=message):
        retrieval_scores(queries, targets, groups)


def test_the_same_sentences_are_told_by_their_tokens():
    sentences = [[5, 6], torch.tensor([7]), [5, 6], torch.tensor([5, 6]), [5]]
    assert sentence_groups(sentences).tolist() == [0, 1, 0, 0, 2]
    assert firsts([0, 1, 0, 0, 2]) == [True, True, False, False, True]
    assert sentence_groups([]).tolist() == [] and firsts([]) == []
