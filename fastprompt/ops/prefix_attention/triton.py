"""Prefix attention through Triton: the operator, its autograd, and the launches. Imported only where triton is there.

All launches follow from shapes; no value on the device is read on the host.
"""

import torch
from torch import Tensor

from fastprompt.ops import _triton
from fastprompt.ops._autograd import direct, once_differentiable, with_derivative
from fastprompt.ops._triton import block_of, cdiv, precision, readable, search_steps

from . import triton_backward as backward_kernels
from . import triton_kernels as forward_kernels

LARGEST_HEAD = 256

# (rows, columns, warps, stages) at most, by kernel and padded head dimension: what keeps all in registers.
CONFIGURATIONS = {
    "forward": {64: (64, 64, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)},
    "query": {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 4, 1)},
    "columns": {64: (64, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 4, 1)},
}
# float32 products run on the plain cores and hold twice the bytes.
FLOAT32_CONFIGURATIONS = {
    "forward": {64: (32, 16, 4, 1), 128: (32, 16, 8, 1), 256: (16, 16, 4, 1)},
    "query": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "columns": {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)},
}
DELTA_ROWS = 32
PROGRAMS = 264  # of the prefix's gradient: two for each of an H100's multiprocessors, each with its own partial sum
SUMMED = dict(SPLITS=16, COLUMNS=128)  # the tile of partial sums that is added up at once


def configuration(kernel: str, features: int, dtype: torch.dtype, rows: int, columns: int) -> dict[str, int]:
    """Tile sizes and launch options.

    Args:
        kernel: "forward", "query" or "columns".
        features: D.
        rows, columns: how many rows and columns a tile can typically fill: larger ones would compute on padding.
    """
    block = block_of(features)
    table = (FLOAT32_CONFIGURATIONS if dtype == torch.float32 else CONFIGURATIONS)[kernel]
    most_rows, most_columns, warps, stages = table[max(64, block)]
    tile_rows = min(most_rows, block_of(rows))
    tile_columns = min(most_columns, block_of(columns))
    owned, most_owned = (tile_columns, most_columns) if kernel == "columns" else (tile_rows, most_rows)
    warps = max(block // 64, warps * owned // most_owned, 1)  # they share the sums of the tile that stays
    return dict(
        FEATURES=features,
        FEATURES_BLOCK=block,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=warps,
        num_stages=stages,
    )


def _segments(cu_seqlens: Tensor, prompt_rows: int) -> int:
    return cu_seqlens.shape[0] - (prompt_rows == 0)  # the prompt's rows are one more


def _typical(query: Tensor, key: Tensor, segments: int) -> tuple[int, int]:
    """The mean segment's tokens, and its rows in a tile: one per token and query head of a group."""
    tokens = max(1, cdiv(query.shape[0], max(1, segments)))
    return tokens, tokens * (query.shape[1] // key.shape[1])


def _prefix_of(x: Tensor, prefix_x: Tensor, prompt_rows: int) -> Tensor:
    """The bank that segments read: the prompt's rows, where they are theirs."""
    return x[:prompt_rows].transpose(0, 1).unsqueeze(0) if prompt_rows else prefix_x


def _readable(x: Tensor) -> Tensor:
    """As the kernels read: they count what lies between the heads of a row in 32 bits."""
    x = readable(x)
    return x.contiguous() if x.shape[1] * x.stride(1) >= 2**31 else x


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(x.stride()[:-1] for x in tensors)


def _reach(window: int | None, is_causal: bool) -> int | None:
    """How far behind a row the last column lies that it sees."""
    return window - 1 if window is not None and is_causal else window


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix_in_window: bool,
    dropout_p: float,
    prompt_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [_readable(x) for x in (query, key, value)]
    banks = zip(tensors[1:], (prefix_key, prefix_value), strict=True)
    tensors += [_readable(_prefix_of(x, bank, prompt_rows)) for x, bank in banks]
    out, lse, peak_sum = _outputs(tensors[0])
    tokens, heads, features = query.shape
    kv_heads, prefix, segments = key.shape[1], tensors[3].shape[2], _segments(cu_seqlens, prompt_rows)
    typical, typical_rows = _typical(query, key, segments)
    config = configuration("forward", features, tensors[0].dtype, typical_rows, max(typical, prefix))
    slots = tokens * (heads // kv_heads) // config["ROWS"] + segments  # see find_tile
    if tokens:
        with torch.cuda.device_of(query):
            forward_kernels.forward_kernel[(slots, kv_heads)](
                *(*tensors, cu_seqlens, prefix_index, seed, out, lse, peak_sum, _strides(*tensors)),
                *(segments, prefix, scale, _reach(window, is_causal), softcap, dropout_p),
                GROUP=heads // kv_heads,
                CAUSAL=is_causal,
                PREFIX_IN_WINDOW=prefix_in_window,
                PROMPT=prompt_rows > 0,
                PRECISION=precision(),
                **config,
            )
    return out.to(query.dtype), lse, peak_sum


def _outputs(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out (T, H, D), log-sum-exp (T, H), peak and sum (T, H, 2), not yet filled."""
    rows = query.shape[:2]
    lse, peak_sum = (query.new_empty(shape, dtype=torch.float32) for shape in (rows, (*rows, 2)))
    return query.new_empty(query.shape), lse, peak_sum


_prefix_attention = torch.library.custom_op("fastprompt::prefix_attention_triton", _forward, mutates_args=())


@_prefix_attention.register_fake
def _(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, *options):
    return _outputs(query)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    peak_sum: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix_in_window: bool,
    dropout_p: float,
    prompt_rows: int,
    query_needs: bool,
    segments_need: bool,
    prefix_needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients; empty are the query's, the key's and value's and the prefix's, where not needed."""
    dtype = query.dtype
    grad, query, key, value, out = (_readable(x) for x in (grad, query, key, value, out))
    needs = query_needs, segments_need, prefix_needs
    grads = _gradients(query, key, value, *(_readable(x) for x in (prefix_key, prefix_value)), *needs)
    prefix_key, prefix_value = (
        _readable(_prefix_of(x, bank, prompt_rows)) for x, bank in ((key, prefix_key), (value, prefix_value))
    )
    (tokens, heads, features), kv_heads, prefix = query.shape, key.shape[1], prefix_key.shape[2]
    group, segments = heads // kv_heads, _segments(cu_seqlens, prompt_rows)
    typical, typical_rows = _typical(query, key, segments)
    reach = _reach(window, is_causal)
    options = scale, reach, softcap, dropout_p
    constants = dict(GROUP=group, PROMPT=prompt_rows > 0, PRECISION=precision())
    delta = peak_sum.new_empty(peak_sum.shape[:2])
    from_rows = query, cu_seqlens, prefix_index, seed, peak_sum, delta
    prefix_grads = grads[1:3] if prompt_rows else grads[3:]
    sums = None
    if (segments_need if prompt_rows else prefix_needs) and prefix_key.numel():
        sums = _PrefixSums(prefix_key, tokens - prompt_rows, group, prompt_rows > 0)
    with torch.cuda.device_of(query):
        if tokens:
            backward_kernels.delta_kernel[(cdiv(tokens * heads, DELTA_ROWS),)](
                *(grad, out, delta, grad.stride()[:-1], tokens * heads, heads),
                *(features, block_of(features), DELTA_ROWS),
            )
        if query_needs and tokens:
            config = configuration("query", features, query.dtype, typical_rows, max(typical, prefix))
            tensors = query, key, value, prefix_key, prefix_value
            backward_kernels.query_kernel[(tokens * group // config["ROWS"] + segments, kv_heads)](
                *(grad, *tensors, cu_seqlens, prefix_index, seed, peak_sum, delta, grads[0]),
                *(grad.stride()[:-1], _strides(*tensors), segments, prefix, *options),
                CAUSAL=is_causal,
                PREFIX_IN_WINDOW=prefix_in_window,
                **constants,
                **config,
            )
        if segments_need and tokens:
            config = configuration("columns", features, query.dtype, typical_rows, typical)
            tensors = query, key, value
            backward_kernels.key_value_kernel[(tokens // config["COLUMNS"] + segments, kv_heads)](
                *(grad, *tensors, cu_seqlens, seed, peak_sum, delta, *grads[1:3]),
                *(sums.of_prompt if prompt_rows else (None, None)),
                *(grad.stride()[:-1], _strides(*tensors), segments, prefix, *options),
                CAUSAL=is_causal,
                **constants,
                **config,
            )
        if sums is not None:
            window_reach = reach if prefix_in_window else None
            options = scale, window_reach, softcap, dropout_p
            sums.fill(prefix_grads, grad, prefix_key, prefix_value, *from_rows, options, constants)
    return tuple(x.to(dtype) for x in grads)


class _PrefixSums:
    """The prefix's gradients, summed over parts of all rows apart, for about PROGRAMS programs.

    A prompt's rows are one part more: what they give to their own keys and values.
    """

    def __init__(self, prefix_key: Tensor, tokens: int, group: int, is_prompt: bool):
        entries, kv_heads, prefix, features = prefix_key.shape
        self.rows = tokens * group
        self.config = configuration("columns", features, prefix_key.dtype, self.rows, prefix)
        self.tiles = cdiv(prefix, self.config["COLUMNS"]), entries * kv_heads
        row_tiles = cdiv(self.rows, self.config["ROWS"])
        splits = max(1, min(PROGRAMS // (self.tiles[0] * self.tiles[1]), row_tiles // 2))
        self.rows_per_split = cdiv(row_tiles, splits) * self.config["ROWS"]
        self.splits, self.parts, self.count = splits, splits + is_prompt, entries * kv_heads * prefix * features
        self.partial = None
        if self.parts > 1:
            self.partial = prefix_key.new_empty((2, self.parts, self.count), dtype=torch.float32)

    @property
    def of_prompt(self) -> tuple[Tensor, Tensor]:
        return self.partial[0, -1], self.partial[1, -1]

    def fill(
        self,
        grads: tuple[Tensor, Tensor],
        grad: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        query: Tensor,
        cu_seqlens: Tensor,
        prefix_index: Tensor | None,
        seed: Tensor | None,
        peak_sum: Tensor,
        delta: Tensor,
        options: tuple,
        constants: dict,
    ) -> None:
        """Fill `grads`, of prefix_key and prefix_value, or the prompt's rows of those of key and value."""
        tensors, kv_heads, prefix = (query, prefix_key, prefix_value), *prefix_key.shape[1:3]
        segments = cu_seqlens.shape[0] - 1  # among the rows behind a prompt's
        parts = grads if self.partial is None else self.partial
        backward_kernels.prefix_kernel[(*self.tiles, self.splits)](
            *(grad, *tensors, cu_seqlens, prefix_index, seed, peak_sum, delta, parts[0], parts[1]),
            *(grad.stride()[:-1], _strides(*tensors), segments, search_steps(segments)),
            *(self.rows, self.rows_per_split, kv_heads, prefix, *options),
            **constants,
            **self.config,
        )
        if self.partial is not None:
            backward_kernels.sum_splits_kernel[(cdiv(self.count, SUMMED["COLUMNS"]), 2)](
                self.partial, *grads, self.parts, self.count, **SUMMED
            )


def _gradients(
    query, key, value, prefix_key, prefix_value, query_needs: bool, segments_need: bool, prefix_needs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = query_needs, segments_need, segments_need, prefix_needs, prefix_needs
    tensors = query, key, value, prefix_key, prefix_value
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(tensors, needs, strict=True))


_prefix_attention_backward = torch.library.custom_op(
    "fastprompt::prefix_attention_triton_backward", _backward, mutates_args=()
)
_run_backward = direct(torch.ops.fastprompt.prefix_attention_triton_backward.default, _backward)


@_prefix_attention_backward.register_fake
def _(grad, query, key, value, prefix_key, prefix_value, *rest):
    return _gradients(query, key, value, prefix_key, prefix_value, *rest[-3:])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, prefix_index, seed = inputs[:8]
    ctx.options = inputs[8:]
    out, lse, peak_sum = output
    ctx.mark_non_differentiable(lse, peak_sum)
    ctx.save_for_backward(*tensors[:5], out, peak_sum, *tensors[5:], prefix_index, seed)


def _backward_formula(ctx, grad_out, *_):
    need = ctx.needs_input_grad
    needs = need[0], need[1] or need[2], need[3] or need[4]
    grads = _run_backward(grad_out, *ctx.saved_tensors, *ctx.options, *needs)
    wanted = [g if wants else None for g, wants in zip(grads, need[:5], strict=True)]
    return *wanted, *[None] * (len(need) - 5)


_run = with_derivative(
    torch.ops.fastprompt.prefix_attention_triton.default,
    _setup_context,
    once_differentiable("prefix_attention", _backward_formula),
    _forward,
)


def why_not(query: Tensor) -> str | None:
    """What keeps these kernels from such a query; None if nothing does."""
    if query.shape[-1] > LARGEST_HEAD:
        return f"takes heads of at most {LARGEST_HEAD} features, got {query.shape[-1]}"
    return _triton.why_not(query)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    cu_seqlens: Tensor,
    prefix_index: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix_in_window: bool,
    dropout_p: float,
    prompt_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and log-sum-exp (T, H), which is not differentiable; arguments as of ops.prefix_attention."""
    if reason := why_not(query):
        raise ValueError(f"backend 'triton' {reason}")
    cu_seqlens = cu_seqlens.contiguous()  # the kernels know no stride of these
    prefix_index = None if prefix_index is None or prompt_rows else prefix_index.contiguous()
    seed = None
    if dropout_p > 0:  # drawn on the device, which nobody then waits for: a graph that is replayed draws anew
        seed = torch.randint_like(cu_seqlens[:1], 2**62, dtype=torch.int64)
    return _run(
        *(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed),
        *(is_causal, scale, window, softcap, prefix_in_window, dropout_p, prompt_rows),
    )[:2]
