"""What may be read of a module's weight outside its own forward."""

import torch
from torch import Tensor, nn


def has_plain_weight(module: nn.Module) -> bool:
    """Whether what a module computes can be computed from its weight as well.

    Not where the weight is elsewhere until the module runs (offloaded by accelerate, sharded by FSDP2 or ZeRO-3), is
    quantised, or something hooks the module, as NEFTune's noise does.
    """
    weight = module.weight
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(weight) in (Tensor, nn.Parameter) and weight.numel() > 0 and not weight.is_meta and not hooked


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, for what is made to stand beside its results.

    Raises:
        ValueError: its weight has no values, and nothing says where they will be.
    """
    if not module.weight.is_meta:
        return module.weight.device
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        raise ValueError(
            "backbone must have its weights on a device, or offloaded by accelerate, which brings them to one, "
            f"got {type(module).__name__} on the meta device"
        )
    return torch.device(device)
