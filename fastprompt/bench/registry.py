"""All cases, by group."""

from collections.abc import Sequence

from .case import Case

GROUPS = ("attention", "alignment", "packing", "pooling", "step")
LAUNCHES = "launches"  # counted, not timed beside each other: a table of its own, see launches.py


def cases(names: Sequence[str] = GROUPS, *, quick: bool = False) -> list[Case]:
    """The cases of some groups, or those whose names begin so; with `quick` a few of each.

    Raises:
        ValueError: no case has such a name.
    """
    from . import alignment, attention, packing, pooling, seq2seq, step

    modules = dict(zip(GROUPS, ((attention,), (alignment,), (packing,), (pooling,), (step, seq2seq)), strict=True))
    found = []
    for name in names:
        group = [case for module in modules.get(name.partition("/")[0], ()) for case in module.cases()]
        fitting = [case for case in group if f"{case.name}/".startswith(name)]
        if not fitting:
            raise ValueError(f"names must be of {GROUPS}, or begin the name of a case, got {name!r}")
        found += [case for case in fitting if case.quick or not quick]
    return found


def find(name: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: there is none.
    """
    for case in cases([name.partition("/")[0]]):
        if case.name == name:
            return case
    raise ValueError(f"name must be that of a case, got {name!r}")
