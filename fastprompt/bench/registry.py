"""All cases, by group."""

from collections.abc import Sequence

from .case import Case

GROUPS = ("attention", "alignment", "packing", "pooling", "step")


def cases(groups: Sequence[str] = GROUPS, *, quick: bool = False) -> list[Case]:
    """The cases of some groups, in the order of `groups`; with `quick` a few of each.

    Raises:
        ValueError: a group there is not.
    """
    from . import alignment, attention, packing, pooling, step

    modules = dict(zip(GROUPS, (attention, alignment, packing, pooling, step), strict=True))
    unknown = [group for group in groups if group not in modules]
    if unknown:
        raise ValueError(f"groups must be of {GROUPS}, got {unknown}")
    return [case for group in groups for case in modules[group].cases() if case.quick or not quick]


def find(name: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: there is none.
    """
    for case in cases([name.partition("/")[0]]):
        if case.name == name:
            return case
    raise ValueError(f"name must be that of a case, got {name!r}")
