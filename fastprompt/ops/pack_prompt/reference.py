"""pack_prompt in plain PyTorch: prompt rows and token rows side by side, then sorted by their segment."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_prompt(
    embedding: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    prompt: Tensor,
    prompt_index: Tensor | None,
    per_segment: bool,
    scale: float,
) -> Tensor:
    tokens = F.embedding(input_ids, embedding) * scale  # (T, E)
    if not per_segment:
        return torch.cat([prompt.flatten(0, 1), tokens])
    segments, prompt_rows = len(cu_seqlens) - 1, prompt.shape[1]
    if prompt_index is None:
        prompt_index = torch.zeros(segments, dtype=torch.int32, device=prompt.device)
    rows = torch.cat([prompt.index_select(0, prompt_index).flatten(0, 1), tokens])  # (B*P + T, E)
    prompt_owner = torch.arange(segments, device=prompt.device).repeat_interleave(prompt_rows)
    token_owner = torch.repeat_interleave(cu_seqlens.diff(), output_size=len(input_ids))
    return rows[torch.cat([prompt_owner, token_owner]).argsort(stable=True)]
