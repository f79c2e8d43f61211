"""Bottleneck adapters in the layers of a backbone that is otherwise left as it is."""

import threading
from functools import partial

from torch import Tensor, nn

from fastprompt.nn import Adapter

from .families import Geometry


class Adapters(nn.ModuleList):
    """Two adapters in each layer, on the output of attention and of the feed-forward part, before each is added.

    They act in packed passes that carry them and in no other call of the backbone.

    Args:
        layers: the backbone's; hooks are put on modules of them. They know the adapters from the pass alone, so that a
            copy of the backbone takes those of its own pass.
        geometry: the backbone's.
        size: features of each bottleneck.
    """

    def __init__(self, layers: nn.ModuleList, geometry: Geometry, size: int) -> None:
        if geometry.sublayers is None or geometry.shares_modules:
            raise ValueError("adapter_size must be None: it is not known where adapters go in this backbone's layers")
        super().__init__(LayerAdapters(geometry.width, size) for _ in layers)
        gate, attention, feed_forward = geometry.sublayers
        for index, layer in enumerate(layers):
            if _is_hooked(layer, attention):
                continue  # by other adapters
            # Not hooks for the time of a call: gradient checkpointing runs the layer again when the call is long over.
            # The attention, which runs first in a layer, is handed the pass both times.
            layer.get_submodule(gate).register_forward_pre_hook(partial(_begin, index), with_kwargs=True)
            layer.get_submodule(attention).register_forward_hook(_after_attention)
            layer.get_submodule(feed_forward).register_forward_hook(_after_feed_forward)

    def check(self, layers: nn.ModuleList, geometry: Geometry) -> None:
        """Raise a ValueError if they would not act in these layers, those of a backbone they were not made for."""
        if len(layers) != len(self) or not _is_hooked(layers[0], geometry.sublayers[1]):
            raise ValueError(f"adapters must have been made for this backbone of {len(layers)} layers")


class LayerAdapters(nn.Module):
    """The adapters of one layer."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Adapter(width, size), Adapter(width, size)


_running = threading.local()  # the adapters of the layer that runs; replicas of a model run in a thread each


def _is_hooked(layer: nn.Module, attention: str) -> bool:
    return _after_attention in layer.get_submodule(attention)._forward_hooks.values()


def _begin(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
    state = kwargs.get("fastprompt_pass")
    adapters = None if state is None else state.adapters
    _running.adapters = None if adapters is None else adapters[index]


def _after_attention(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    adapters = getattr(_running, "adapters", None)
    return output if adapters is None else adapters.attention(output)


def _after_feed_forward(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    adapters, _running.adapters = getattr(_running, "adapters", None), None
    return output if adapters is None else adapters.feed_forward(output)
