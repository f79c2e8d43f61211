"""PackingCollator: a batch packed where it is loaded, so that a step on a GPU need not wait to read it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral

import numpy as np
import torch

from fastprompt.models.packed.layout import NO_LABEL, Packing

PER_TOKEN = ("labels", "token_type_ids")
PER_SAMPLE = ("prompt_ids",)


class PackingCollator:
    """Puts samples of any lengths into one row, for `PromptModel` and models that `fastprompt.fuse` changed.

    For a DataLoader, or a Trainer (`data_collator=`). Of features with `input_ids` and, in all or none of them,
    `attention_mask` (its zeros are left out), `labels`, `token_type_ids` and `prompt_ids` (numbers or names) it makes:

    - input_ids, labels, token_type_ids, position_ids, each (1, T) int64; positions begin at 0 in each sample;
    - cu_seq_lens_q, cu_seq_lens_k, (S+1,) int32, and max_length_q, max_length_k: as DataCollatorWithFlattening's;
    - prompt_ids, a list of S;
    - packing, a `fastprompt.models.packed.layout.Packing`: the same on the host, for the forward.

    Example:
        >>> collate = PackingCollator()
        >>> batch = collate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["cu_seq_lens_q"].tolist()
        ([[5, 6, 7, 8, 9]], [[-100, 6, 7, -100, 9]], [0, 3, 5])

    Args:
        separator_id: the label of each sample's first token, which so is not predicted from the sample before. None:
            its own, as for classes of the tokens themselves, or where a prompt's last row is to predict it.
    """

    def __init__(self, separator_id: int | None = NO_LABEL) -> None:
        if separator_id is not None and (isinstance(separator_id, bool) or not isinstance(separator_id, Integral)):
            raise TypeError(f"separator_id must be None or an integer, got {separator_id!r}")
        self.separator_id = separator_id

    def __call__(self, features: Sequence[Mapping]) -> dict:
        """Pack the features into one row; the class says what they hold and what is made of them.

        Raises:
            ValueError: no features, a name that is not one of those or not in all, or lengths that disagree.
        """
        names = _names(features)
        columns = {name: [_row(name, each[name]) for each in features] for name in names if name not in PER_SAMPLE}
        for name, rows in columns.items():
            for n, (row, ids) in enumerate(zip(rows, columns["input_ids"], strict=True)):
                if row.shape != ids.shape:
                    raise ValueError(
                        f"{name} must have {len(ids)} entries in feature {n}, as input_ids, got {len(row)}"
                    )
        if "attention_mask" in columns:
            kept = [mask != 0 for mask in columns.pop("attention_mask")]
            columns = {
                name: [row[keep] for row, keep in zip(rows, kept, strict=True)] for name, rows in columns.items()
            }
        if "labels" in columns and self.separator_id is not None:
            columns["labels"] = [
                np.concatenate([[self.separator_id], row[1:]])[: len(row)] for row in columns["labels"]
            ]
        packing = Packing.of_lengths([len(row) for row in columns["input_ids"]])
        columns = {name: np.concatenate(rows).astype(np.int64) for name, rows in columns.items()}
        if "labels" in columns:
            packing = replace(packing, labelled=np.flatnonzero(columns["labels"] != NO_LABEL))
        batch = {name: torch.from_numpy(row).unsqueeze(0) for name, row in columns.items()}
        batch["position_ids"] = torch.tensor(packing.positions).unsqueeze(0)
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor(packing.cu_seqlens)
        batch["max_length_q"] = batch["max_length_k"] = packing.longest
        for name in set(PER_SAMPLE) & set(names):
            batch[name] = [each[name] if isinstance(each[name], str) else int(each[name]) for each in features]
        return batch | {"packing": packing}


def _names(features: Sequence[Mapping]) -> list[str]:
    if not features:
        raise ValueError("features must hold at least one sample, got none")
    names, known = list(features[0]), ("input_ids", "attention_mask", *PER_TOKEN, *PER_SAMPLE)
    if "input_ids" not in names or set(names) - set(known):
        raise ValueError(f"features must have input_ids and may have {known[1:]}, got {names}")
    for n, each in enumerate(features):
        if set(each) != set(names):
            raise ValueError(f"features must all have {names}, as the first, got {list(each)} in feature {n}")
    return names


def _row(name: str, values: Sequence[int] | torch.Tensor) -> np.ndarray:
    row = np.asarray(values)
    if row.ndim != 1 or (len(row) and not np.issubdtype(row.dtype, np.integer) and row.dtype != bool):
        raise ValueError(f"{name} must be a list of integers in each feature, got {row.dtype} of shape {row.shape}")
    return row
