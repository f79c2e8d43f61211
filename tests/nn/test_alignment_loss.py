import pytest
import torch
import torch.nn.functional as F

from fastprompt.nn import AlignmentLoss
from fastprompt.ops import alignment_loss


def vectors(student_dim, teacher_dim, rows=7, dtype=torch.float32):
    return torch.randn(rows, student_dim, dtype=dtype), torch.randn(rows, teacher_dim, dtype=dtype)


def test_starts_at_the_identity():
    student, teacher = vectors(6, 6)
    loss = AlignmentLoss(6, 6, bias=True)
    assert torch.equal(loss.project(student), student)
    torch.testing.assert_close(loss(student, teacher), (1 - F.cosine_similarity(student, teacher)).mean())
    torch.testing.assert_close(loss(student, 3 * student), torch.tensor(0.0))


@pytest.mark.parametrize("student_dim, teacher_dim", [(3, 5), (5, 3), (1, 4), (4, 1)])
def test_rectangular(student_dim, teacher_dim):
    student, teacher = vectors(student_dim, teacher_dim)
    loss = AlignmentLoss(student_dim, teacher_dim, normalize="none", distance="mse")
    assert loss.weight.shape == (teacher_dim, student_dim)
    common = min(student_dim, teacher_dim)
    started = torch.zeros(7, teacher_dim)
    started[:, :common] = student[:, :common]
    assert torch.equal(loss.project(student), started)
    torch.testing.assert_close(loss(student, teacher), F.mse_loss(started, teacher))


@pytest.mark.parametrize("bias", [False, True])
def test_parameters(bias):
    loss = AlignmentLoss(3, 5, bias=bias)
    shapes = {name: tuple(parameter.shape) for name, parameter in loss.named_parameters()}
    assert shapes == ({"weight": (5, 3), "bias": (5,)} if bias else {"weight": (5, 3)})
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in loss.parameters())
    assert set(loss.state_dict()) == set(shapes)
    assert bias or loss.bias is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": "layer", "distance": "smooth_l1"},
        {"normalize": "none", "distance": "mse+cosine"},
        {"distance": "infonce"},
        {"distance": "infonce", "temperature": 0.6},
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_is_the_operator(options, bias, weighted):
    student, teacher = vectors(4, 6, dtype=torch.float64)
    row_weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 3.0]) if weighted else None
    loss = AlignmentLoss(4, 6, bias=bias, **options).double()
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter)
    got = loss(student, teacher, row_weight)
    want = alignment_loss(student, teacher, loss.weight, loss.bias, row_weight=row_weight, **options)
    assert torch.equal(got, want)
    got_grad, want_grad = (torch.autograd.grad(value, list(loss.parameters())) for value in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(got_grad, want_grad, strict=True))
    torch.testing.assert_close(loss.project(student), student @ loss.weight.T + (loss.bias if bias else 0))


@pytest.mark.parametrize(
    "normalize, distance", [("l2", "cosine"), ("layer", "mse"), ("none", "smooth_l1"), ("l2", "infonce+cosine")]
)
def test_trains(normalize, distance):
    # The teacher is a linear function of the student, so the projection can reach it.
    student = torch.randn(64, 5)
    teacher = student @ torch.randn(5, 4) + torch.randn(4)
    row_weight = torch.ones(64)
    row_weight[::4] = 0
    teacher[::4] = torch.randn(16, 4)  # these rows contradict it
    loss = AlignmentLoss(5, 4, bias=True, normalize=normalize, distance=distance)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(student, teacher, row_weight)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.05 * values[0] if distance != "infonce+cosine" else values[-1] < 0.5 * values[0]
    reached = F.cosine_similarity(loss.project(student), teacher)
    if normalize == "layer":
        reached = F.cosine_similarity(*(x - x.mean(1, keepdim=True) for x in (loss.project(student), teacher)))
    assert reached[row_weight > 0].mean() > 0.95 > reached[row_weight == 0].mean()


def test_bfloat16_module():
    student, teacher = vectors(3, 5, dtype=torch.bfloat16)
    loss = AlignmentLoss(3, 5, bias=True).bfloat16()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and loss.weight.grad.dtype == loss.bias.grad.dtype == torch.bfloat16


def test_other_dtypes_are_brought_to_the_projections():
    student, teacher = vectors(3, 5)
    loss = AlignmentLoss(3, 5)
    got = loss(student.bfloat16(), teacher.half())
    torch.testing.assert_close(got, loss(student.bfloat16().float(), teacher.half().float()), rtol=0, atol=0)


def test_frozen_inputs_get_no_gradient():
    student, teacher = vectors(3, 5)
    student.requires_grad_()
    loss = AlignmentLoss(3, 5).requires_grad_(False)
    loss(student, teacher).backward()
    assert student.grad.any() and teacher.grad is None and loss.weight.grad is None


def test_state_dict_round_trip():
    first, second = AlignmentLoss(3, 5, bias=True), AlignmentLoss(3, 5, bias=True)
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    second.load_state_dict(first.state_dict())
    student, teacher = vectors(3, 5)
    assert torch.equal(first(student, teacher), second(student, teacher))


def test_repr():
    text = AlignmentLoss(3, 5).extra_repr()
    assert text == "3, 5, bias=False, normalize='l2', distance='cosine', temperature=None, pooling='mean', gather=False"
    text = AlignmentLoss(4, 2, distance="mse+infonce", pooling="last", gather=True).extra_repr()
    assert "distance='mse+infonce', temperature=None, pooling='last', gather=True" in text


@pytest.mark.parametrize(
    "options, match",
    [
        ({"distance": "euclid"}, r"distance must be one of \('cosine', .*\), .* got 'euclid'"),
        ({"distance": "mse+mse"}, r"distance must be .* different ones joined by '\+', got 'mse\+mse'"),
        ({"temperature": -1.0}, "temperature must be at least 1e-06 and finite, got -1.0"),
        ({"normalize": "l1"}, r"normalize must be one of \('l2', 'layer', 'none'\), got 'l1'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        AlignmentLoss(3, 5, **options)


@pytest.mark.parametrize(
    "student, teacher, match",
    [
        (torch.ones(7, 4), torch.ones(7, 5), r"weight must have shape \(5, 4\) .*, got \(5, 3\)"),
        (torch.ones(7, 3), torch.ones(7, 4), r"weight must have shape \(4, 3\) .*, got \(5, 3\)"),
        (torch.ones(7, 3), torch.ones(6, 5), r"teacher must have shape \(7, 5\) .*, got \(6, 5\)"),
        (torch.ones(2, 7, 3), torch.ones(3, 7, 5), r"teacher must have shape \(2, 5\) .*, got \(3, 5\)"),
        (torch.ones(3), torch.ones(7, 5), "must have two dimensions"),
    ],
)
def test_bad_input(student, teacher, match):
    with pytest.raises(ValueError, match=match):
        AlignmentLoss(3, 5)(student, teacher)
