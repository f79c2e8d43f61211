"""What training in several processes asks of a model."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wants_all_gradients(model: nn.Module) -> bool:
    """Whether each backward has to reach everything that trains, read or not: processes wait for each other's parts."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    wrapper = DistributedDataParallel._get_active_ddp_module()
    return isinstance(model, FSDPModule) or (wrapper is not None and not wrapper.find_unused_parameters)
