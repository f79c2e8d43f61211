"""Layers of a frozen backbone with fused operators instead of the stock ones, in place.

A module changes its class to a subclass of its own, so it copies, pickles, trains and generates as before. Where a
fused operator cannot run (another device or dtype, trained weights, autocast, torch.compile, which fuses by itself),
the class's own forward does. Modules that something else has given a forward (Liger's kernels, accelerate's hooks) are
left alone.
"""

import inspect
from functools import cache

import torch
from torch import Tensor, nn

from fastprompt.ops._checks import choose_elementwise
from fastprompt.ops.gated import gated
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.rotary import rotary

from . import probes
from .passes import PackedPass


def fuse_layers(model: nn.Module) -> None:
    """Give the layers of `model` their fused forward, those there is one for."""
    with probes.probing():
        for module in model.modules():
            if isinstance(module, Fused) or not is_stock(module):
                continue
            for kind, probe in KINDS.items():
                found = probes.probed(probe, module)
                if found is not None:
                    module.__class__, module.__dict__["_fused"] = _fused_class(kind, type(module)), found
                    break


def is_stock(module: nn.Module) -> bool:
    """Whether its forward is its class's own, not another that stands in its place."""
    forward = inspect.unwrap(type(module).forward)
    return forward.__module__ == type(module).__module__ and "forward" not in vars(module)


def _fits(x: Tensor) -> bool:
    return (
        choose_elementwise(None, x, {}) != "reference"
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


class Fused:
    """What stands before a module's own class; `_fused` holds what its probe found."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Its class has no name in a module to be found by: a copy makes it anew.
        return _blank, type(self).made_of, self.__dict__


class FusedNorm(Fused):
    """Rounded once, in bfloat16 too: Llama's own rounds before the weight as well. float64 is not taken to float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not _fits(x) or weight.dtype != x.dtype or (weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        return rms_norm(x, weight, **self._fused)


class FusedMLP(Fused):
    """Activation and product in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fits(x):
            return super().forward(x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), **self._fused))


class FusedAttention(Fused):
    """In a packed pass, heads stay where the projections put them: (R, H, D), no transposition, no copy."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, *args, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        packed_pass = kwargs.get("fastprompt_pass")
        if not isinstance(packed_pass, PackedPass) or not _fits(hidden_states):
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        rows = hidden_states.squeeze(0)  # (R, E)
        heads = len(rows), -1, self.head_dim
        query, key, value = (project(rows).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if "q_norm" in self._modules:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = (x.squeeze(0) for x in position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0
        query, key = rotary(query, key, cos, sin)
        output = packed_pass.attend(self.layer_idx, query, key, value, dropout_p=dropout, **self._fused)
        return self.o_proj(output.flatten(1)).unsqueeze(0), None


KINDS = {FusedNorm: probes.norm, FusedMLP: probes.mlp, FusedAttention: probes.attention}


@cache
def _fused_class(kind: type, stock: type) -> type:
    return type(f"Fused{stock.__name__}", (kind, stock), {"made_of": (kind, stock)})


def _blank(kind: type, stock: type) -> nn.Module:
    made = _fused_class(kind, stock)
    return made.__new__(made)
