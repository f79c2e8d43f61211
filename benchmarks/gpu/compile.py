"""Compiles, beside the tests, what later phases time; the compilers' caches are shared."""

import functools
from collections.abc import Callable, Iterator

from .records import Records

# What a process of its own compiles: a group, and a share of its cases.
PARTS = ("attention 1/2", "attention 2/2", "alignment", "tiles 1/3", "tiles 2/3", "tiles 3/3", "steps")


def cases() -> dict[str, Callable[[], dict]]:
    return {name: functools.partial(_compile, name) for name in PARTS}


def _compile(part: str) -> dict:
    """Run once what is not held; what fails is recorded where it is timed."""
    group, _, share = part.partition(" ")
    first, step = map(int, share.split("/")) if share else (1, 1)
    errors = {}
    for name, call in list(_pending(group))[first - 1 :: step]:
        print(name, flush=True)
        try:
            errors |= {f"{name} {way}": error for way, error in call().get("errors", {}).items()}
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:200]
    return {"errors": errors}


def _pending(group: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    from . import attention, steps, tiles

    if group == "tiles":
        held = Records("tiles").held
        yield from ((name, functools.partial(case, 1)) for name, case in tiles.cases().items() if not held(name))
    elif group == "steps":
        held = Records("steps").held
        for size in steps.MODELS:
            for way in ("ours", "liger"):
                if not all(held(f"{size}-{way}-{batch}") for batch in steps.BATCHES):
                    yield f"{size}-{way}", functools.partial(steps.once, size, way)
    else:
        held = Records("attention").held
        for case in attention.problems():
            if case.group == group and not held(case.label):
                yield case.label, functools.partial(attention.once, case)
