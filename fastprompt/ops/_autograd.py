"""The derivative of an operator, and the refusal of a second one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

_STORED = (Tensor, torch.nn.Parameter)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes the first `count` tensors on; who differentiates them, by any of the tensors, gets an error."""

    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError(f"{ctx.name} has no second derivative, but for backend 'reference'")


def once_differentiable(name: str, differentiate: Callable) -> Callable:
    """The `backward` of an autograd.Function, made so that who differentiates what it returns gets an error.

    Without, autograd takes the gradients of a fused kernel for constants, and a gradient penalty is silently wrong.
    (torch.autograd.function.once_differentiable does not know what the gradients depend on: with allow_unused=True
    they pass for constants still.)

    Args:
        name: of the operator, for the message.
        differentiate: (ctx, *grads) -> a gradient or None for each input.
    """

    def backward(ctx, *grads: Tensor | None) -> tuple:
        if not torch.is_grad_enabled():  # which it is under create_graph=True
            return differentiate(ctx, *grads)
        with torch.no_grad():
            found = differentiate(ctx, *grads)
        depends = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        places = [n for n, grad in enumerate(found) if grad is not None]
        passed = _NoSecondDerivative.apply(name, len(places), *(found[n] for n in places), *depends)
        passed = dict(zip(places, passed, strict=True))
        return tuple(passed.get(n) for n in range(len(found)))

    return backward


def direct(operator: OpOverload, launch: Callable) -> Callable:
    """An operator whose kernels Python launches, without the dispatcher's cost where nothing needs it.

    Args:
        operator: of torch.library.custom_op.
        launch: what it runs on tensors with values.

    Returns:
        A function of the operator's positional arguments, to be called below autograd. Tensors without values, of a
        subclass, or under a mode that watches operators go through the operator.
    """

    def run(*inputs):
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        plain = not watched and all(type(x) in _STORED and not x.is_meta for x in inputs if isinstance(x, Tensor))
        return launch(*inputs) if plain else operator(*inputs)

    return run


def with_derivative(
    operator: OpOverload, save: Callable, differentiate: Callable, launch: Callable | None = None
) -> Callable:
    """Register an operator's derivative, and return a function that runs the operator at less cost per call.

    An autograd.Function that calls the operator below autograd costs 80 us less per call than the registered autograd,
    which torch.compile needs.

    Args:
        operator: of torch.ops.fastprompt.
        save, differentiate: setup_context and backward, as of `torch.library.register_autograd`.
        launch: where the operator is Python's, what it runs; see `direct`.

    Returns:
        A function of the operator's positional arguments, all of them.
    """
    torch.library.register_autograd(operator.name(), differentiate, setup_context=save)
    below = operator if launch is None else direct(operator, launch)

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():  # not the registered autograd inside of this one
            output = below(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function = type(operator.name(), (torch.autograd.Function,), methods)

    def run(*inputs):
        return operator(*inputs) if torch.compiler.is_compiling() else function.apply(*inputs)

    return run
