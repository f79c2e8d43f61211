"""Steps as CUDA graphs: forward and backward of batches of one shape, recorded once and then replayed.

Not `torch.cuda.make_graphed_callables`: the gradients it returns are the graph's own memory, which autograd makes a
parameter's `.grad`, and the next replay writes over what was accumulated there.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastprompt.ops._autograd import once_differentiable

from .layout import Plan

DEVICES = ("cuda",)
WARM_UPS = 3  # kernels are compiled and libraries begin in the first, as they could not in a capture
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_OF_MODELS = WeakKeyDictionary()  # not in the model: copies of it have memory of their own


def serves(model: nn.Module, inputs: dict, is_filled_up: bool) -> bool:
    """Whether a pass over these inputs is to be a graph, as far as can be told from them."""
    device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
    if device.type not in DEVICES or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if not is_filled_up and model.training:
        _warn("its batch has no fixed shape, as PackingCollator gives it with max_tokens")
    return is_filled_up


def run(
    model: nn.Module,
    function: Callable[[Any, Plan], Any],
    batch: Any,
    plan: Plan,
    constants: tuple,
    adapters: nn.Module | None = None,
) -> tuple[Any] | None:
    """What `function(batch, plan on the device)` returns, in a tuple, from a graph; None where there can be none.

    Args:
        model: whose parameters the function reads, where they are.
        function: from the same shapes it makes the same launches. Its output is a tree.
        batch: a tree of tensors, and of what else is the same whenever a graph is replayed.
        plan: on the host.
        constants: hashable, what else the launches depend on.
        adapters: the other module with parameters.
    """
    leaves, tree = tree_flatten(batch)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    look, device = _Look(x for x in (model, adapters) if x is not None), tensors[0].device
    if look.why_not is not None:
        return _warn(look.why_not)
    if not look.trained and not any(x.requires_grad for x in tensors):
        return None
    steps = _OF_MODELS.get(model)
    if steps is None or look.places != steps.places:  # graphs read parameters where they were
        steps = _OF_MODELS[model] = _Steps(device, look.places)
    kinds = tuple((x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves)
    key = kinds, tree, plan.shapes, constants, look.modes, *_surroundings(device.type)
    if key not in steps.known:

        def of_leaves(tensors: Iterable[Tensor], plan: Plan):
            tensors = iter(tensors)
            return function(tree_unflatten([next(tensors) if isinstance(x, Tensor) else x for x in leaves], tree), plan)

        steps.known[key] = _Step(of_leaves, tensors, plan, look.trained, steps)
    return (steps.known[key].run(steps, tensors, look.trained, plan),)


class Recorder:
    """The launches of a function, recorded: all there is of CUDA here.

    Args:
        function: what is run for it.
        stream, pool: on which, and whose memory it takes.
    """

    def __init__(self, function: Callable[[], Sequence[Tensor]], stream: torch.cuda.Stream, pool: tuple) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # A loader's thread that pins memory meanwhile breaks no capture of this one.
        options = {"stream": stream, "pool": pool, "capture_error_mode": "thread_local"}
        with torch.cuda.device(stream.device), torch.cuda.graph(self.graph, **options):
            self.result = function()

    def replay(self) -> None:
        self.graph.replay()

    @staticmethod
    def begin(device: torch.device) -> tuple[torch.cuda.Stream, tuple]:
        """A stream and a pool."""
        return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    @staticmethod
    def warm_up(function: Callable[[], object], stream: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(stream)


class _Look:
    """What there is to know of modules before a step.

    Attributes:
        trained: their parameters that require a gradient.
        places: where their tensors lie.
        modes: of each module, whether it is in training mode, and the names of its parameters among those.
        why_not: what keeps a step from being a graph; None: nothing does.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        pending, trained, places, modes, self.why_not = list(modules), {}, [], [], None
        while pending:  # plain on purpose: it passes a thousand tensors in each step
            module = pending.pop()
            own = module.__dict__
            if own["_modules"]:
                pending.extend(child for child in own["_modules"].values() if child is not None)
            modes.append(own["training"])
            for name, tensor in own["_parameters"].items():
                if tensor is None:
                    continue
                places.append(tensor.data_ptr())
                if tensor.requires_grad:
                    modes.append(name)
                    trained[id(tensor)] = tensor
                    if tensor._backward_hooks:
                        self.why_not = f"a parameter of {type(module).__name__} has a hook"
            if own["_buffers"]:
                places.extend(tensor.data_ptr() for tensor in own["_buffers"].values() if tensor is not None)
            for name in HOOKS:
                if own[name] and any(map(_is_foreign, own[name].values())):
                    self.why_not = f"{type(module).__name__} has a hook, which a graph would not call"
            if own["training"] and own.get("gradient_checkpointing"):
                self.why_not = "gradient checkpointing saves the state of random numbers, which a capture cannot"
            if "_is_replica" in own:
                self.why_not = "replicas of nn.DataParallel are made anew in each step"
        self.trained, self.places, self.modes = list(trained.values()), tuple(places), tuple(modes)


class _Steps:
    """The steps of one model, which share their memory: of two, the second begins after the first one's backward."""

    def __init__(self, device: torch.device, places: tuple) -> None:
        self.device, self.places, self.known, self.turn = device, places, {}, 0
        self.stream, self.pool = Recorder.begin(device)


class _Step:
    """Forward and backward of batches of one shape."""

    def __init__(
        self,
        function: Callable[[Iterable[Tensor], Plan], Any],
        tensors: list[Tensor],
        plan: Plan,
        trained: list[nn.Parameter],
        steps: _Steps,
    ) -> None:
        # Keys and values of all layers come together, not one by one: those of one kind that want a gradient.
        kinds: dict = {}
        for n, x in enumerate(tensors):
            kinds.setdefault((x.shape, x.dtype) if x.requires_grad and x.ndim else n, []).append(n)
        self.groups, device = list(kinds.values()), steps.device
        given = self._joined(tensors)
        self.inputs = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in given]
        self.data = plan.pinned(device).to(device, non_blocking=True)
        self._take(given, plan)
        for x, static in zip(given, self.inputs, strict=True):
            static.requires_grad_(x.requires_grad)
        self.wants = [x.requires_grad for x in (*self.inputs, *trained)]
        wanted = [x for x in (*self.inputs, *trained) if x.requires_grad]

        def forward() -> list[Tensor]:
            with _without_autocast_cache(device.type):
                output = function(self._apart(self.inputs), plan.within(self.data))
            leaves, self.tree = tree_flatten(output)
            self.is_tensor = [isinstance(x, Tensor) for x in leaves]
            self.others = [None if isinstance(x, Tensor) else x for x in leaves]
            return [x for x in leaves if isinstance(x, Tensor)]

        def backward(outputs: list[Tensor], grads: list[Tensor]) -> list[Tensor | None]:
            with torch.autocast(device.type, enabled=False):  # as a backward is to be, behind it
                found = [x for x in outputs if x.requires_grad]
                return list(torch.autograd.grad(found, wanted, grads, allow_unused=True))

        def both() -> None:
            outputs = forward()
            backward(outputs, [torch.zeros_like(x) for x in outputs if x.requires_grad])

        Recorder.warm_up(both, steps.stream)
        try:
            self.forward = Recorder(forward, steps.stream, steps.pool)
            outputs = self.forward.result
            self.differentiable = [x.requires_grad for x in outputs]
            self.grads = [torch.zeros_like(x) for x in outputs if x.requires_grad]
            self.backward = Recorder(lambda: backward(outputs, self.grads), steps.stream, steps.pool)
        except RuntimeError as error:
            raise RuntimeError("the step cannot be captured as a CUDA graph: set cuda_graphs to False") from error
        self.outputs = [x.detach() for x in outputs]
        self.forward.result = None  # the graph of autograd has served

    def run(self, steps: _Steps, tensors: list[Tensor], trained: list[nn.Parameter], plan: Plan):
        outputs = iter(_Replay.apply(steps, self, plan, *self._joined(tensors), *trained))
        leaves = zip(self.is_tensor, self.others, strict=True)
        return tree_unflatten([next(outputs) if is_tensor else other for is_tensor, other in leaves], self.tree)

    def replay_forward(self, tensors: Sequence[Tensor], plan: Plan) -> list[Tensor]:
        """Outputs that are the caller's to keep."""
        self._take(tensors[: len(self.inputs)], plan)
        self.forward.replay()
        return [x.clone() for x in self.outputs]

    def replay_backward(self, grads: Iterable[Tensor]) -> list[Tensor | None]:
        """The gradients of inputs and parameters, the caller's to keep."""
        grads = [x for x, differentiable in zip(grads, self.differentiable, strict=True) if differentiable]
        for static, x in zip(self.grads, grads, strict=True):
            static.copy_(x)
        self.backward.replay()
        found = [x for x in self.backward.result if x is not None]
        copies = iter(torch._foreach_mul(found, 1) if found else [])  # one launch for all
        wanted = iter([None if x is None else next(copies) for x in self.backward.result])
        return [next(wanted) if wants else None for wants in self.wants]

    @torch.no_grad()
    def _take(self, tensors: Sequence[Tensor], plan: Plan) -> None:
        self.data.copy_(plan.pinned(self.data.device), non_blocking=True)
        for static, x in zip(self.inputs, tensors, strict=True):
            static.copy_(x, non_blocking=True)

    def _joined(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[g[0]] if len(g) == 1 else torch.cat([tensors[n] for n in g]) for g in self.groups]

    def _apart(self, joined: list[Tensor]) -> list[Tensor]:
        found = {}
        for group, x in zip(self.groups, joined, strict=True):
            found |= zip(group, [x] if len(group) == 1 else x.chunk(len(group)), strict=True)
        return [found[n] for n in range(len(found))]


def _differentiate(ctx, *grads: Tensor) -> tuple:
    if ctx.steps.turn != ctx.turn:
        raise RuntimeError(
            "a step as a CUDA graph must have its backward once, before the model's next forward: "
            "set cuda_graphs to False to keep several"
        )
    ctx.steps.turn += 1
    return None, None, None, *ctx.step.replay_backward(grads)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, steps: _Steps, step: _Step, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        steps.turn += 1
        ctx.steps, ctx.step, ctx.turn = steps, step, steps.turn
        ctx.save_for_backward(*(x for x in tensors if x.requires_grad))  # a second derivative depends on them
        outputs = step.replay_forward(tensors, plan)
        constants = (x for x, differentiable in zip(outputs, step.differentiable, strict=True) if not differentiable)
        ctx.mark_non_differentiable(*constants)
        return tuple(outputs)

    backward = staticmethod(once_differentiable("a step as a CUDA graph", _differentiate))


def _is_foreign(hook: Callable) -> bool:
    """Not one of those that launch what adapters do, or gather hidden states: a graph does that, too."""
    home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return home.split(".")[0] not in ("fastprompt", "transformers")


def _warn(reason: str) -> None:
    warnings.warn(f"a step runs without a CUDA graph: {reason}", stacklevel=2)


def _surroundings(device_type: str) -> tuple:
    """What launches depend on beside their inputs."""
    lowered = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return lowered, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()


def _without_autocast_cache(device_type: str) -> torch.autocast:
    """As it is, but for its cache of weights: those would be of another pass, in memory that is not the graph's."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
