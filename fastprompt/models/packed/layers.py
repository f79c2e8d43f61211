"""Layers of a frozen backbone with fused operators instead of the stock ones, in place.

A module changes its class to a subclass of its own, so it copies, pickles, trains and generates as before. Where a
fused operator cannot run (another device or dtype, trained weights, autocast, torch.compile, which fuses by itself),
the class's own forward does. Modules that something else has given a forward (Liger's kernels, accelerate's hooks) are
left alone.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from fastprompt.ops._checks import choose_elementwise
from fastprompt.ops.gated import gated
from fastprompt.ops.rms_norm import rms_norm
from fastprompt.ops.rotary import rotary

from .passes import PackedPass

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # of a configuration, and the operator's


def fuse_layers(model: nn.Module) -> None:
    """Give the layers of `model` their fused forward, those there is one for."""
    for module in model.modules():
        if type(module) in FUSED and _is_stock(module):
            module.__class__ = FUSED[type(module)]


def _is_stock(module: nn.Module) -> bool:
    """Whether its class is transformers', not what stands under that name, and its forward the class's own."""
    home = type(module).__module__
    forward = inspect.unwrap(type(module).forward)
    return home.startswith("transformers.") and forward.__module__ == home and "forward" not in vars(module)


def _fits(x: Tensor) -> bool:
    return (
        choose_elementwise(None, x, {}) != "reference"
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
    )


class _RMSNorm(nn.Module):
    """Rounded once, in bfloat16 too: Llama's own rounds before the weight as well. float64 is not taken to float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not _fits(x) or weight.dtype != x.dtype or (weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        return rms_norm(x, weight, self._eps, self._offset)


class FusedLlamaRMSNorm(_RMSNorm, LlamaRMSNorm):
    _offset = 0.0

    @property
    def _eps(self) -> float:
        return self.variance_epsilon


class FusedGemma3RMSNorm(_RMSNorm, Gemma3RMSNorm):
    _offset = 1.0

    @property
    def _eps(self) -> float:
        return self.eps


class _MLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS.get(self._activation)
        if not _fits(x) or activation is None:
            return super().forward(x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), activation))


class FusedLlamaMLP(_MLP, LlamaMLP):
    @property
    def _activation(self) -> str:
        return self.config.hidden_act


class FusedGemma3MLP(_MLP, Gemma3MLP):
    @property
    def _activation(self) -> str:
        return self.config.hidden_activation


class _Attention(nn.Module):
    """In a packed pass, heads stay where the projections put them: (R, H, D), no transposition, no copy."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        packed_pass = kwargs.get("fastprompt_pass")
        if not isinstance(packed_pass, PackedPass) or not _fits(hidden_states):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        rows = hidden_states.squeeze(0)  # (R, E)
        heads = len(rows), -1, self.head_dim
        query, key, value = (project(rows).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (x.squeeze(0) for x in position_embeddings)
        output = packed_pass.attend(
            self.layer_idx,
            *rotary(*self._normalized(query, key), cos, sin),
            value,
            scale=self.scaling,
            window=getattr(self, "sliding_window", None),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(output.flatten(1)).unsqueeze(0), None


class FusedLlamaAttention(_Attention, LlamaAttention):
    def _normalized(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


class FusedGemma3Attention(_Attention, Gemma3Attention):
    def _normalized(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(query), self.k_norm(key)


FUSED = {
    LlamaRMSNorm: FusedLlamaRMSNorm,
    LlamaMLP: FusedLlamaMLP,
    LlamaAttention: FusedLlamaAttention,
    Gemma3RMSNorm: FusedGemma3RMSNorm,
    Gemma3MLP: FusedGemma3MLP,
    Gemma3Attention: FusedGemma3Attention,
}
