"""Which modules a fused operator can stand in for: those that have its parts, and on small random numbers its results.

Nothing is told by a family's or a class's name, and nothing of the module's own weights is read.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.ops.gated.reference import gated
from fastprompt.ops.rms_norm.reference import rms_norm
from fastprompt.ops.rotary.reference import rotary

ROWS, WIDTH = 3, 8
_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@contextmanager
def probing() -> Iterator[None]:
    """Where probes run: their numbers leave no trace in those that others draw."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        yield


def probed(probe: Callable[[nn.Module], dict | None], module: nn.Module) -> dict | None:
    """What a fused forward of the module is given; None: there is none."""
    try:
        return probe(module)
    except Exception:  # it wants other parts or arguments: it stays what it is
        return None


def norm(module: nn.Module) -> dict | None:
    """eps and offset of an RMS norm."""
    weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or len(module._parameters) != 1 or module._modules or eps is None:
        return None
    like, x = _like(module), 10 * eps**0.5 * _random(ROWS, WIDTH)
    like.weight = nn.Parameter(_random(WIDTH))
    got = type(module).forward(like, x)
    same = (each for each in (0.0, 1.0) if _close(got, rms_norm(x, like.weight, eps, each)))
    return next(({"eps": eps, "offset": offset} for offset in same), None)


def mlp(module: nn.Module) -> dict | None:
    """The activation of a gated MLP."""
    if not {"gate_proj", "up_proj", "down_proj"} <= module._modules.keys() <= {*_MLP, "act_fn"}:
        return None
    line = torch.linspace(-4, 4, 50)
    name = next((name for name, known in _ACTIVATIONS.items() if _close(module.act_fn(line), known(line))), None)
    like, x = _like(module), _random(ROWS, WIDTH)
    like.act_fn = module.act_fn
    like.gate_proj, like.up_proj, like.down_proj = _linear(WIDTH, 6), _linear(WIDTH, 6), _linear(6, WIDTH)
    expected = like.down_proj(gated(like.gate_proj(x), like.up_proj(x), name))
    return {"activation": name} if name and _close(type(module).forward(like, x), expected) else None


_MLP = ("gate_proj", "up_proj", "down_proj")


class _Recorder:
    """In place of a pass: keeps what attention is called with, and gives random numbers."""

    def attention(self, module, query: Tensor, key: Tensor, value: Tensor, mask, **options) -> tuple[Tensor, None]:
        self.called, self.options = (query, key, value), options
        self.output = _random(1, query.shape[2], query.shape[1], query.shape[3])
        return self.output, None


def attention(module: nn.Module) -> dict | None:
    """scale, window and softcap of an attention with rotary embedding, and maybe norms of each query and key."""
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= module._modules.keys() <= {*_ATTENTION, "q_norm", "k_norm"}:
        return None
    if list(inspect.signature(type(module).forward).parameters)[1:3] != ["hidden_states", "position_embeddings"]:
        return None
    like, groups, features = _like(module), module.num_key_value_groups, module.head_dim
    like.q_proj, like.k_proj = _linear(WIDTH, groups * features), _linear(WIDTH, features)
    like.v_proj, like.o_proj = _linear(WIDTH, features), _linear(groups * features, WIDTH)
    for name in ("q_norm", "k_norm"):
        if name in module._modules:
            setattr(like, name, _like(getattr(module, name)))
            getattr(like, name).weight = nn.Parameter(_random(*getattr(module, name).weight.shape))
    x, angles, recorder = _random(ROWS, WIDTH), _random(ROWS, features // 2).repeat(1, 2), _Recorder()
    cos, sin = angles.cos(), angles.sin()
    got, weights = type(module).forward(
        like,
        hidden_states=x[None],
        position_embeddings=(cos[None], sin[None]),
        attention_mask=None,
        fastprompt_pass=recorder,
    )
    query, key, value = (each(x).view(ROWS, -1, features) for each in (like.q_proj, like.k_proj, like.v_proj))
    if "q_norm" in module._modules:
        query, key = like.q_norm(query), like.k_norm(key)
    expected = *rotary(query, key, cos, sin), value
    called = (each.squeeze(0).transpose(0, 1) for each in recorder.called)
    options = recorder.options
    same = all(_close(x, y) for x, y in zip(called, expected, strict=True))
    same = same and weights is None and _close(got[0], like.o_proj(recorder.output[0].flatten(1)))
    if not same or options["dropout"] != module.attention_dropout or not hasattr(module, "layer_idx"):
        return None
    return {"scale": options["scaling"], "window": options["sliding_window"], "softcap": options["softcap"]}


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _like(module: nn.Module) -> nn.Module:
    """A module of the same class and settings in training mode, without parameters and modules."""
    like = type(module).__new__(type(module))
    nn.Module.__init__(like)
    vars(like).update({name: value for name, value in vars(module).items() if name not in vars(like)})
    return like


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32)


def _linear(features: int, out: int) -> nn.Linear:
    return nn.Linear(features, out, bias=False, dtype=torch.float32)


def _close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
