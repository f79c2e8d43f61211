"""What models that run packed have in common for whoever runs them: CUDA graphs, and torch.compile."""

from collections.abc import Callable

import torch

# Tracing it would make a new graph for each batch.
on_host = torch.compiler.disable(
    reason="a packed forward plans each batch on the host; the model's own compile() compiles what runs between"
)

_COMPILED: dict = {}


class RunsPacked:
    """A model with a packed forward.

    Attributes:
        cuda_graphs: training steps on a GPU run as CUDA graphs; see `fastprompt.PromptModel`.
        compile_options: what `compile` was given; None: nothing is compiled.
    """

    cuda_graphs: bool = False
    compile_options: dict | None = None

    def compile(self, **options) -> None:
        """Compile the base model, all of its layers as one graph without breaks, and leave the rest as it is.

        `torch.compile(model)` compiles nothing here: each batch is planned on the host, in NumPy, and to trace that
        would give each batch a graph of its own. It runs the model as without.

        Args:
            options: of `torch.compile`, such as dynamic and mode.

        Raises:
            TypeError: an option that it does not have.
        """
        torch.compile(len, **options)
        self.compile_options = options


def compiled(forward: Callable, options: dict) -> Callable:
    """A class's forward, compiled: once for all of its modules, so that copies of a module run their own weights."""
    key = forward, repr(sorted(options.items()))
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(forward, **{"fullgraph": True} | options)
    return _COMPILED[key]
