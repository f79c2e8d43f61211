"""What the fuzzers of all operators share: how an operator is held to its reference, and for how long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, in_layout
from torch import Tensor

EXAMPLES = 10  # between two looks at the clock
DRAWS = 2  # of rounding noise: a single one may be none
LOOSE = 16

layouts = st.sampled_from([None, *LAYOUTS])
# Rows of a handful of segments, with empty ones among them.
lengths = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=5)


def fuzz(check: Callable, strategies: dict[str, st.SearchStrategy], seconds: float, begin: int) -> int:
    """Call `check` with drawn arguments for so many seconds; a failure is shrunk and raised. Returns the number."""
    count, stop = 0, time.monotonic() + seconds

    def counted(random: int, **drawn) -> None:
        nonlocal count
        count += 1
        torch.manual_seed(random)
        check(**drawn)

    options = settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    given_strategies = given(random=st.integers(0, 2**32), **strategies)
    while time.monotonic() < stop:
        begin += 1
        seed(begin)(options(given_strategies(counted)))()
    return count


@st.composite
def trained(draw, names: tuple[str, ...]) -> dict[str, tuple[bool, str | None]]:
    """For each tensor, whether it asks for a gradient, and how it lies in memory."""
    return {name: (draw(st.booleans()), draw(layouts)) for name in names}


def compare(
    run: Callable,
    reference: Callable,
    tensors: dict[str, Tensor],
    how: dict[str, tuple[bool, str | None]],
    grad_layout: str | None,
    threads: int,
) -> None:
    """Hold outputs and gradients of `run` to those of `reference` in float64.

    The error may be LOOSE times what the reference makes in the tensors' own dtype or what one rounding of the inputs
    makes of the exact result, and as many roundings of the greatest number of any output or gradient: what is zero in
    theory is a difference of such. This looks for what is wrong; the operator's own tests look for digits.

    Args:
        run, reference: tensors by name -> a tensor or a tuple of them.
        tensors: by name, floating point, contiguous.
        how: of `trained`.
        grad_layout: of the incoming gradients.
        threads: of `run`; the reference has one.
    """
    wants = {name: trains for name, (trains, _) in how.items()}
    given = {}
    for name, x in tensors.items():
        layout = how[name][1]
        given[name] = x if layout is None else in_layout(x, layout)
    # Not `tensors`: in the layout "expanded" there are other values.
    values = {name: x.clone(memory_format=torch.contiguous_format) for name, x in given.items()}
    before = {name: x.clone() for name, x in given.items()}
    grads = []
    with _threads(threads):
        outputs, leaves = _outputs(run, given, wants)
        for out in outputs:
            grad = torch.randn_like(out, memory_format=torch.contiguous_format)
            grads.append(grad if grad_layout is None or grad.ndim == 0 else in_layout(grad, grad_layout))
        got = _all(outputs, leaves, grads)
    exactly = partial(_exact, reference, wants=wants, grads=grads)
    want, slack = exactly(values), _slack(exactly, partial(_all_of, reference, wants=wants, grads=grads), values)
    eps = torch.finfo(next(iter(tensors.values())).dtype).eps
    finite = (x.nan_to_num(posinf=0, neginf=0) for x in (*want.values(), *grads))
    greatest = max(_gap(x, 0) for x in finite)
    for label, ours in got.items():
        assert ours.shape == want[label].shape, label
        assert torch.equal(ours.isnan(), want[label].isnan()), f"{label}: NaN in one and not in the other"
        error, budget = _gap(ours, want[label]), LOOSE * (slack[label] + eps * greatest)
        assert error <= budget, f"{label}: off by {error}, of at most {budget}"
    for name, x in given.items():
        assert torch.equal(x, before[name]), f"{name} was written to"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    was = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(was)


def _gap(x: Tensor, y: Tensor | float) -> float:
    return float((x.double() - y).nan_to_num().abs().max()) if x.numel() else 0.0


def _slack(exactly: Callable, plainly: Callable, values: dict[str, Tensor]) -> dict[str, float]:
    """By label: the error of the reference in the tensors' dtype and the effect of rounding noise in them, the greatest
    of some draws. Of float64, which has no better, those of float32 in proportion.
    """
    dtype = next(iter(values.values())).dtype
    shrink = 1.0
    if dtype == torch.float64:
        values = {name: x.float() for name, x in values.items()}
        shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    want, slack = exactly(values), {}
    for draw in range(DRAWS):
        moved = {name: _moved(x) for name, x in values.items()} if draw else values
        exact, plain = exactly(moved) if draw else want, plainly(moved)
        for label, x in exact.items():
            slack[label] = max(slack.get(label, 0.0), shrink * _gap(plain[label], x), shrink * _gap(x, want[label]))
    return slack


def _moved(x: Tensor) -> Tensor:
    """Each number moved by one unit in its last place, or not."""
    towards = torch.randint(-1, 2, x.shape) * torch.finfo(x.dtype).max
    return torch.where(towards == 0, x, torch.nextafter(x, towards.to(x.dtype)))


def _exact(reference: Callable, values: dict[str, Tensor], wants: dict, grads: list[Tensor]) -> dict[str, Tensor]:
    return _all_of(reference, {name: x.double() for name, x in values.items()}, wants, [g.double() for g in grads])


def _all_of(reference: Callable, values: dict[str, Tensor], wants: dict, grads: list[Tensor]) -> dict[str, Tensor]:
    return _all(*_outputs(reference, values, wants), grads)


def _outputs(run: Callable, tensors: dict[str, Tensor], wants: dict[str, bool]) -> tuple[list[Tensor], dict]:
    leaves = {name: x.detach().requires_grad_(wants[name]) for name, x in tensors.items()}
    result = run(**leaves)
    return list(result) if isinstance(result, tuple) else [result], leaves


def _all(outputs: list[Tensor], leaves: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients, by a label of each."""
    found = {f"output {n}": out.detach() for n, out in enumerate(outputs)}
    asked = {name: x for name, x in leaves.items() if x.requires_grad}
    paths = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    if asked and paths:
        outs, incoming = zip(*paths, strict=True)
        gradients = torch.autograd.grad(outs, list(asked.values()), incoming, allow_unused=True, materialize_grads=True)
        found |= dict(zip(asked, gradients, strict=True))
    return found
