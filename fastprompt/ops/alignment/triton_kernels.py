"""Triton kernels of the alignment loss. Sums are float32 whatever the inputs are.

z is the projected student row, t the teacher's; u and v are the two normalised. A row of weight 0 is not kept: it is
never read, and counts as a row of zeros whose loss has no share in the result.

Arguments that are None (bias, row_weight, share, ...), FEATURES and the names in capitals are constants of the
compilation.
"""

import triton
import triton.language as tl

from .reference import EPS

SQUARE_EPS = tl.constexpr(EPS * EPS)


@triton.jit
def find_kept(row_weight, row, end):
    kept = row < end
    if row_weight is not None:
        kept = kept & (tl.load(row_weight + row, mask=kept, other=0.0) != 0.0)
    return kept


@triton.jit
def load_share(share, row, kept, scale):
    """By what a row's loss is multiplied in the result: by `scale` where no shares are given."""
    if share is None:
        return tl.where(kept, scale, 0.0)
    else:  # not compiled then
        return tl.load(share + row, mask=kept, other=0.0)


@triton.jit
def load_block(tensor, offset, column, mask):
    return tl.load(tensor + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def product_tile(
    a,
    b,
    a_offset,
    b_offset,
    a_there,
    b_there,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
):
    """(ROWS, COLUMNS): the products of rows of a with rows of b, both of DEPTH features."""
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, DEPTH, DEPTH_BLOCK):
        feature = begin + tl.arange(0, DEPTH_BLOCK)
        inside = (feature < DEPTH)[None, :]
        x = tl.load(a + a_offset[:, None] + feature[None, :], mask=a_there[:, None] & inside, other=0.0)
        y = tl.load(b + b_offset[:, None] + feature[None, :], mask=b_there[:, None] & inside, other=0.0)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
    return product


@triton.jit
def inverse_root(square):
    return tl.div_rn(tl.full(square.shape, 1.0, dtype=tl.float32), tl.sqrt_rn(square))


@triton.jit
def inverse_norm(square):
    """1 / norm from the sum of squares; 0 for a row that counts as zero."""
    zero = square <= SQUARE_EPS
    return tl.where(zero, 0.0, inverse_root(tl.where(zero, 1.0, square)))


@triton.jit
def find_scales(square, FEATURES: tl.constexpr, NORMALIZE: tl.constexpr, COSINE: tl.constexpr):
    """By what a row is multiplied to be normalised, and then to be of unit norm, as the cosine compares it."""
    one = tl.full(square.shape, 1.0, dtype=tl.float32)
    inverse, to_unit = one, one
    if NORMALIZE == "l2":
        inverse = inverse_norm(square)
    if NORMALIZE == "layer":
        inverse = inverse_root(square / FEATURES + 1e-5)
    if COSINE and NORMALIZE != "l2":
        to_unit = inverse_norm(square * inverse * inverse)
    return inverse, to_unit


@triton.jit
def find_sizes(
    z,
    teacher,
    z_offset,
    t_offset,
    kept,
    FEATURES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COSINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What to subtract from rows of z and t and then to multiply them by: (mean, inverse, to_unit) of z, then of t."""
    mean_z = tl.zeros((ROWS,), dtype=tl.float32)
    mean_t, zz, tt = mean_z, mean_z, mean_z
    if NORMALIZE == "layer":
        # Less its first feature, a row of equal features is exactly zero.
        first_z = tl.load(z + z_offset, mask=kept, other=0.0).to(tl.float32)
        first_t = tl.load(teacher + t_offset, mask=kept, other=0.0).to(tl.float32)
        for begin in range(0, FEATURES, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            there = kept[:, None] & (column < FEATURES)[None, :]
            a, b = load_block(z, z_offset, column, there), load_block(teacher, t_offset, column, there)
            mean_z += tl.sum(tl.where(there, a - first_z[:, None], 0.0), 1)
            mean_t += tl.sum(tl.where(there, b - first_t[:, None], 0.0), 1)
        mean_z, mean_t = first_z + mean_z / FEATURES, first_t + mean_t / FEATURES
    if NORMALIZE != "none" or COSINE:
        for begin in range(0, FEATURES, BLOCK):  # about the mean: sums of squares alone would cancel
            column = begin + tl.arange(0, BLOCK)
            there = kept[:, None] & (column < FEATURES)[None, :]
            a = tl.where(there, load_block(z, z_offset, column, there) - mean_z[:, None], 0.0)
            b = tl.where(there, load_block(teacher, t_offset, column, there) - mean_t[:, None], 0.0)
            zz += tl.sum(a * a, 1)
            tt += tl.sum(b * b, 1)
    inverse_z, to_unit_z = find_scales(zz, FEATURES, NORMALIZE, COSINE)
    inverse_t, to_unit_t = find_scales(tt, FEATURES, NORMALIZE, COSINE)
    return mean_z, inverse_z, to_unit_z, mean_t, inverse_t, to_unit_t


@triton.jit(do_not_specialize=["rows", "features_per_split"])
def sums_kernel(
    student,
    teacher,
    weight,
    bias,
    row_weight,
    sums,
    strides,
    rows,
    features_per_split,
    STUDENT_FEATURES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
):
    """Each row's sums of z^2, t^2 and z t over a part of the features: (splits, 3, N). Grid: (tiles of N, splits)."""
    student_stride, teacher_stride, weight_stride = strides
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = find_kept(row_weight, row, rows)
    first = tl.program_id(1) * features_per_split
    end = tl.minimum(first + features_per_split, FEATURES)
    zz = tl.zeros((ROWS,), dtype=tl.float32)
    tt, zt = zz, zz
    for begin in range(first, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        z = product_tile(
            *(student, weight, row.to(tl.int64) * student_stride, column.to(tl.int64) * weight_stride),
            *(kept, column < end, STUDENT_FEATURES, PRECISION, ROWS, COLUMNS, DEPTH_BLOCK),
        )
        if bias is not None:
            z += tl.load(bias + column, mask=column < end, other=0.0).to(tl.float32)[None, :]
        there = kept[:, None] & (column < end)[None, :]
        t = load_block(teacher, row.to(tl.int64) * teacher_stride, column, there)
        zz += tl.sum(z * z, 1)
        tt += tl.sum(t * t, 1)
        zt += tl.sum(z * t, 1)
    written = sums + tl.program_id(1) * 3 * rows + row
    tl.store(written, zz, mask=row < rows)
    tl.store(written + rows, tt, mask=row < rows)
    tl.store(written + 2 * rows, zt, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def cosine_kernel(
    sums,
    row_weight,
    share,
    losses,
    rows,
    scale,
    splits,
    ROWS: tl.constexpr,
):
    """losses (N,) from the sums of all splits. Grid: (tiles of N,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = find_kept(row_weight, row, rows)
    zz = tl.zeros((ROWS,), dtype=tl.float32)
    tt, zt = zz, zz
    for split in range(splits):
        read = sums + split * 3 * rows + row
        zz += tl.load(read, mask=kept, other=0.0)
        tt += tl.load(read + rows, mask=kept, other=0.0)
        zt += tl.load(read + 2 * rows, mask=kept, other=0.0)
    cosine = zt * inverse_norm(zz) * inverse_norm(tt)
    tl.store(losses + row, load_share(share, row, kept, scale) * (1.0 - cosine), mask=row < rows)


@triton.jit
def distance_gradients(
    u,
    v,
    share,
    to_unit,
    FEATURES: tl.constexpr,
    COSINE: tl.constexpr,
    MSE: tl.constexpr,
    SMOOTH_L1: tl.constexpr,
):
    """The gradients of u and v, but for infonce's, and the cosine's along each itself (find_along).

    to_unit: the product of both rows'.
    """
    gap = u - v
    slope = gap * 0.0
    if MSE:
        slope += gap * (2.0 / FEATURES)
    if SMOOTH_L1:
        slope += tl.minimum(tl.maximum(gap, -1.0), 1.0) / FEATURES
    grad_u, grad_v = slope, -slope
    if COSINE:
        grad_u -= v * to_unit[:, None]
        grad_v -= u * to_unit[:, None]
    return grad_u * share[:, None], grad_v * share[:, None]


@triton.jit
def find_along(dot, cosine, to_unit, FEATURES: tl.constexpr, NORMALIZE: tl.constexpr):
    """How much of a normalised row u is taken off its gradient, from the sum `dot` of u * grad.

    What grad lacks of the cosine's is u * cosine * to_unit^2, with `cosine` that of the rows times their share. "l2"
    takes what is along u out again.
    """
    if NORMALIZE == "l2":
        return dot
    elif NORMALIZE == "layer":
        return (dot + cosine) / FEATURES - cosine * to_unit * to_unit
    else:
        return -cosine * to_unit * to_unit


@triton.jit
def through_normalization(
    grad, u, inverse, total, along, FEATURES: tl.constexpr, NORMALIZE: tl.constexpr, COSINE: tl.constexpr
):
    """The gradient of a row from that of its normalised u; total: the sum of grad."""
    if NORMALIZE == "layer":
        grad -= total[:, None] / FEATURES
    if NORMALIZE != "none" or COSINE:
        grad -= u * along[:, None]
    return grad * inverse[:, None]


@triton.jit(do_not_specialize=["first", "end", "rows"])
def row_kernel(
    z,
    teacher,
    row_weight,
    share,
    infonce,
    grad_u,
    grad_v,
    losses,
    grad_teacher,
    teacher_stride,
    first,
    end,
    rows,
    scale,
    FEATURES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COSINE: tl.constexpr,
    MSE: tl.constexpr,
    SMOOTH_L1: tl.constexpr,
    GRAD_Z: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """losses (N,) of the rows first..end, whose z (end - first, Dt) is overwritten by its gradient if GRAD_Z.

    infonce (2, N): its losses by direction. grad_u, grad_v (end - first, Dt): its gradients. grad_teacher (N, Dt) or
    None. Grid: (tiles of end - first,).
    """
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = first + local
    kept = find_kept(row_weight, row, end)
    row_share = load_share(share, row, kept, scale)
    z_offset, t_offset = local.to(tl.int64) * FEATURES, row.to(tl.int64) * teacher_stride
    mean_z, inverse_z, to_unit_z, mean_t, inverse_t, to_unit_t = find_sizes(
        z, teacher, z_offset, t_offset, kept, FEATURES, NORMALIZE, COSINE, ROWS, BLOCK
    )
    to_unit = to_unit_z * to_unit_t
    GRADIENTS: tl.constexpr = GRAD_Z or grad_teacher is not None
    loss = tl.zeros((ROWS,), dtype=tl.float32)
    cosine, total_u, total_v, dot_u, dot_v = loss, loss, loss, loss, loss
    if infonce is not None:
        loss += tl.load(infonce + row, mask=kept, other=0.0) * 0.5
        loss += tl.load(infonce + rows + row, mask=kept, other=0.0) * 0.5
    for begin in range(0, FEATURES, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        there = kept[:, None] & (column < FEATURES)[None, :]
        u = load_block(z, z_offset, column, there)
        v = load_block(teacher, t_offset, column, there)
        u = tl.where(there, (u - mean_z[:, None]) * inverse_z[:, None], 0.0)
        v = tl.where(there, (v - mean_t[:, None]) * inverse_t[:, None], 0.0)
        gap = u - v
        if COSINE:
            cosine += tl.sum(u * v, 1)
        if MSE:
            loss += tl.sum(gap * gap, 1) / FEATURES
        if SMOOTH_L1:
            size = tl.abs(gap)
            loss += tl.sum(tl.where(size < 1.0, 0.5 * gap * gap, size - 0.5), 1) / FEATURES
        if GRADIENTS and NORMALIZE != "none":
            du, dv = distance_gradients(u, v, row_share, to_unit, FEATURES, COSINE, MSE, SMOOTH_L1)
            if grad_u is not None:
                du += load_block(grad_u, z_offset, column, there)
            if grad_v is not None:
                dv += load_block(grad_v, z_offset, column, there)
            total_u, total_v = total_u + tl.sum(du, 1), total_v + tl.sum(dv, 1)
            dot_u, dot_v = dot_u + tl.sum(du * u, 1), dot_v + tl.sum(dv * v, 1)
    cosine *= to_unit
    if COSINE:
        loss += 1.0 - cosine
    tl.store(losses + row, loss * row_share, mask=row < end)
    if GRADIENTS:
        along_u = find_along(dot_u, cosine * row_share, to_unit_z, FEATURES, NORMALIZE)
        along_v = find_along(dot_v, cosine * row_share, to_unit_t, FEATURES, NORMALIZE)
        for begin in range(0, FEATURES, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = (column < FEATURES)[None, :]
            there = kept[:, None] & inside
            u = load_block(z, z_offset, column, there)
            v = load_block(teacher, t_offset, column, there)
            u = (u - mean_z[:, None]) * inverse_z[:, None]
            v = (v - mean_t[:, None]) * inverse_t[:, None]
            du, dv = distance_gradients(u, v, row_share, to_unit, FEATURES, COSINE, MSE, SMOOTH_L1)
            written = (row < end)[:, None] & inside
            if GRAD_Z:
                if grad_u is not None:
                    du += load_block(grad_u, z_offset, column, there)
                dz = through_normalization(du, u, inverse_z, total_u, along_u, FEATURES, NORMALIZE, COSINE)
                tl.store(z + z_offset[:, None] + column[None, :], dz.to(z.dtype.element_ty), mask=written)
            if grad_teacher is not None:
                if grad_v is not None:
                    dv += load_block(grad_v, z_offset, column, there)
                dt = through_normalization(dv, v, inverse_t, total_v, along_v, FEATURES, NORMALIZE, COSINE)
                target = grad_teacher + row.to(tl.int64)[:, None] * FEATURES + column[None, :]
                tl.store(target, dt.to(grad_teacher.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["rows"])
def normalize_kernel(
    z,
    teacher,
    row_weight,
    unit,
    teacher_stride,
    rows,
    FEATURES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """unit (2, N, Dt): u and v, zero where a row is left out. Grid: (tiles of N,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = find_kept(row_weight, row, rows)
    z_offset, t_offset = row.to(tl.int64) * FEATURES, row.to(tl.int64) * teacher_stride
    mean_z, inverse_z, _, mean_t, inverse_t, _ = find_sizes(
        z, teacher, z_offset, t_offset, kept, FEATURES, NORMALIZE, False, ROWS, BLOCK
    )
    for begin in range(0, FEATURES, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = (column < FEATURES)[None, :]
        u = load_block(z, z_offset, column, kept[:, None] & inside)
        v = load_block(teacher, t_offset, column, kept[:, None] & inside)
        u = (u - mean_z[:, None]) * inverse_z[:, None]
        v = (v - mean_t[:, None]) * inverse_t[:, None]
        written = (row < rows)[:, None] & inside
        target = unit + z_offset[:, None] + column[None, :]
        tl.store(target, u.to(unit.dtype.element_ty), mask=written)
        target = unit + (rows + row).to(tl.int64)[:, None] * FEATURES + column[None, :]
        tl.store(target, v.to(unit.dtype.element_ty), mask=written)
