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

    With `max_tokens` and `max_samples` all batches of a bucket have one shape, so that a step on a GPU can be a CUDA
    graph (see `cuda_graphs` of `PromptModel`). Tokens that fill the row up have no label, stand at position 0, and are
    samples of their own: they share the places that the batch's samples leave free, and one more. Their prompt_ids are
    the first sample's.

    Example:
        >>> collate = PackingCollator(max_tokens=[4, 8], max_samples=2)
        >>> batch = collate([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}])
        >>> batch["labels"].tolist(), batch["cu_seq_lens_q"].tolist()
        ([[-100, 6, 7, -100, 9, -100, -100, -100]], [0, 3, 5, 8])

    Args:
        separator_id: the label of each sample's first token, which so is not predicted from the sample before. None:
            its own, as for classes of the tokens themselves, or where a prompt's last row is to predict it.
        max_tokens: the length of the row, or several, of which the least is taken that holds the batch; None: the
            batch's own.
        max_samples: the most samples of a batch, with max_tokens.
        max_labels: the most labelled tokens of a batch, with max_tokens. The head of a causal language model then runs
            on that many rows; None: on as many as there are tokens.
    """

    def __init__(
        self,
        separator_id: int | None = NO_LABEL,
        *,
        max_tokens: int | Sequence[int] | None = None,
        max_samples: int | None = None,
        max_labels: int | None = None,
    ) -> None:
        if separator_id is not None and (isinstance(separator_id, bool) or not isinstance(separator_id, Integral)):
            raise TypeError(f"separator_id must be None or an integer, got {separator_id!r}")
        if (max_tokens is None) != (max_samples is None) or (max_tokens is None and max_labels is not None):
            raise ValueError(
                "max_tokens and max_samples must be given together, and max_labels with them only, "
                f"got {max_tokens}, {max_samples} and {max_labels}"
            )
        buckets = list(max_tokens) if isinstance(max_tokens, Sequence) else [max_tokens]
        for name, numbers in (("max_tokens", buckets), ("max_samples", [max_samples]), ("max_labels", [max_labels])):
            wrong = [
                n for n in numbers if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n < 1)
            ]
            if wrong or not numbers:
                raise ValueError(f"{name} must be a positive integer, got {wrong[0] if wrong else numbers!r}")
        self.separator_id, self.max_samples, self.max_labels = separator_id, max_samples, max_labels
        self.buckets = None if max_tokens is None else sorted(buckets)

    def __call__(self, features: Sequence[Mapping]) -> dict:
        """Pack the features into one row; the class says what they hold and what is made of them.

        Raises:
            ValueError: no features, a name that is not one of those or not in all, lengths that disagree, or more than
                max_tokens, max_samples or max_labels.
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
        lengths = [len(row) for row in columns["input_ids"]]
        columns = {name: np.concatenate(rows).astype(np.int64) for name, rows in columns.items()}
        labelled = np.flatnonzero(columns["labels"] != NO_LABEL) if "labels" in columns else None
        packing = Packing.of_lengths(lengths) if self.buckets is None else self._filled_up(lengths, labelled)
        packing, more = replace(packing, labelled=labelled), packing.shape[1] - sum(lengths)
        columns = {
            name: np.pad(row, (0, more), constant_values=NO_LABEL if name == "labels" else 0)
            for name, row in columns.items()
        }
        batch = {name: torch.from_numpy(row).unsqueeze(0) for name, row in columns.items()}
        batch["position_ids"] = torch.tensor(packing.positions).unsqueeze(0)
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor(packing.cu_seqlens)
        batch["max_length_q"] = batch["max_length_k"] = packing.longest if self.buckets is None else packing.shape[1]
        for name in set(PER_SAMPLE) & set(names):
            batch[name] = [each[name] if isinstance(each[name], str) else int(each[name]) for each in features]
            batch[name] += batch[name][:1] * (packing.segments - len(features))
        return batch | {"packing": packing}

    def _filled_up(self, lengths: list[int], labelled: np.ndarray | None) -> Packing:
        """The packing of samples of those lengths in the least bucket that holds them."""
        tokens, labels = sum(lengths), 0 if labelled is None else len(labelled)
        for name, got, most in (
            ("max_tokens", tokens, self.buckets[-1]),
            ("max_samples", len(lengths), self.max_samples),
            ("max_labels", labels, self.max_labels or labels),
        ):
            if got > most:
                raise ValueError(f"features must fit into {name}, {most}, got {got}: make the batches smaller")
        bucket = next(bucket for bucket in self.buckets if bucket >= tokens)
        return Packing.filled_up(lengths, bucket, self.max_samples, min(self.max_labels or bucket, bucket))


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
