"""Bottleneck adapters in the layers of a backbone that is otherwise left as it is."""

from torch import Tensor, nn

from fastprompt.nn import Adapter

from .packed import PackedBackbone


class Adapters(nn.ModuleList):
    """Two adapters in each layer, on the output of attention and of the feed-forward part, before each is added.

    They act in packed passes that carry them and in no other call of the backbone.

    Args:
        packed: the backbone; hooks are put on modules of its layers.
        size: features of each bottleneck.
    """

    def __init__(self, packed: PackedBackbone, size: int) -> None:
        super().__init__(LayerAdapters(layer, i, packed, size) for i, layer in enumerate(packed.layers))


class LayerAdapters(nn.Module):
    """The adapters of one layer."""

    def __init__(self, layer: nn.Module, index: int, packed: PackedBackbone, size: int) -> None:
        super().__init__()
        width, (gate, *places) = packed.geometry.hidden, packed.geometry.sublayers
        self.index, self.active = index, False
        self.attention, self.feed_forward = Adapter(width, size), Adapter(width, size)
        # Not hooks for the time of a call: gradient checkpointing runs the layer again when the call is long over. The
        # attention, which runs first in a layer, is handed the pass both times.
        layer.get_submodule(gate).register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.get_submodule(places[0]).register_forward_hook(self._after_attention)
        layer.get_submodule(places[1]).register_forward_hook(self._after_feed_forward)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        state = kwargs.get("fastprompt_pass")
        adapters = None if state is None else state.adapters
        self.active = adapters is not None and adapters[self.index] is self

    def _after_attention(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.attention(output) if self.active else output

    def _after_feed_forward(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.feed_forward(output) if self.active else output
