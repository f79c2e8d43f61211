"""What a causal language model does between its head's weight and its loss, read off the source of its forward."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

_STATES = r"\w*outputs(\.last_hidden_state|\[0\])|slice_logits_to_keep\(hidden_states, logits_to_keep\)"
_HEAD = r"self\.\w+\(hidden_states(\[:, slice_indices, :\])?\)(\.contiguous\(\))?"
_LOSS = r"None|self\.loss_function\(.*\)|\+= self\.router_aux_loss_coef \* aux_loss\.to\(loss\.device\)"
_SCALES = {
    "logits / self.config.logits_scaling": lambda model: 1 / model.config.logits_scaling,  # Granite
    "logits * self.logit_scale": lambda model: model.logit_scale,  # Cohere
}
_CAP = r"(self\.config\.)?final_logit_softcapping"  # in three steps
_CAPPING = [rf"logits / {_CAP}", r"torch\.tanh\(logits\)", rf"logits \* {_CAP}"]


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """c tanh(logits / c); without a cap the logits as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def scale_and_cap(model: nn.Module) -> tuple[float, float | None] | None:
    """s and c of a head whose logits are s x or, with a cap, c tanh(s x / c), for x = hidden @ weight.T.

    None if its forward does anything else: its logits must then come from itself.
    """
    forward = inspect.unwrap(model.forward)
    found = _found(getattr(forward, "__func__", forward))
    if found is None:
        return None
    scale, (scales, is_capped) = 1.0, found
    for each in scales:
        scale *= each(model)
    return scale, model.config.get_text_config().final_logit_softcapping if is_capped else None


@cache
def _found(forward: Callable) -> tuple[list[Callable], bool] | None:
    try:
        assigned = list(_assigned(ast.parse(textwrap.dedent(inspect.getsource(forward)))))
    except (OSError, TypeError, SyntaxError):  # it has no source
        return None
    kept = {
        name: [value for target, value in assigned if target == name] for name in ("hidden_states", "logits", "loss")
    }
    logits, scales = kept["logits"], []
    if any(target.startswith("logits[") for target, _ in assigned):
        return None
    if not logits or not all(re.fullmatch(_STATES, value) for value in kept["hidden_states"]):
        return None
    if not re.fullmatch(_HEAD, logits.pop(0)) or not all(re.fullmatch(_LOSS, value) for value in kept["loss"]):
        return None
    while logits and logits[0] in _SCALES:
        scales.append(_SCALES[logits.pop(0)])
    is_capped = len(logits) == 3 and all(map(re.fullmatch, _CAPPING, logits))
    return None if logits and not is_capped else (scales, is_capped)


def _assigned(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Targets and values of all assignments, in the order of the source."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)]
    for node in sorted(statements, key=lambda node: node.lineno):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        sign = "+= " if isinstance(node, ast.AugAssign) else ""
        for target in targets:
            yield ast.unparse(target), sign + ast.unparse(node.value) if node.value is not None else ""
