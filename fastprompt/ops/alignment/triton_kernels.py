"""Triton kernels of the alignment loss. Sums are float32 whatever the inputs are.

z is the projected student row, t the teacher's; u and v are the two normalised. A row of weight 0 is not kept: it is
never read, and counts as a row of zeros whose loss has no share in the result.

Arguments that are None (bias, row_weight, share, ...), FEATURES and the names in capitals are constants of the
compilation.
"""

import triton
import triton.language as tl


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
def inverse_size(square, FEATURES: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr):
    """1 / norm or 1 / standard deviation from the sum of squares; 0 for a row that counts as zero."""
    if NORMALIZE == "none":
        return tl.full(square.shape, 1.0, dtype=tl.float32)
    else:
        if NORMALIZE == "layer":
            square = square / FEATURES
        zero = square <= EPS * EPS
        root = tl.sqrt_rn(tl.where(zero, 1.0, square))
        return tl.where(zero, 0.0, tl.div_rn(tl.full(square.shape, 1.0, dtype=tl.float32), root))


@triton.jit
def find_sizes(
    z,
    teacher,
    z_offset,
    t_offset,
    kept,
    FEATURES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What to subtract from rows of z and t and then to multiply them by: (mean_z, mean_t, inverse_z, inverse_t)."""
    mean_z = tl.zeros((ROWS,), dtype=tl.float32)
    mean_t, zz, tt = mean_z, mean_z, mean_z
    if NORMALIZE == "layer":
        for begin in range(0, FEATURES, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            there = kept[:, None] & (column < FEATURES)[None, :]
            mean_z += tl.sum(load_block(z, z_offset, column, there), 1)
            mean_t += tl.sum(load_block(teacher, t_offset, column, there), 1)
        mean_z, mean_t = mean_z / FEATURES, mean_t / FEATURES
    if NORMALIZE != "none":
        for begin in range(0, FEATURES, BLOCK):  # about the mean: sums of squares alone would cancel
            column = begin + tl.arange(0, BLOCK)
            there = kept[:, None] & (column < FEATURES)[None, :]
            a = tl.where(there, load_block(z, z_offset, column, there) - mean_z[:, None], 0.0)
            b = tl.where(there, load_block(teacher, t_offset, column, there) - mean_t[:, None], 0.0)
            zz += tl.sum(a * a, 1)
            tt += tl.sum(b * b, 1)
    inverse_z = inverse_size(zz, FEATURES, NORMALIZE, EPS)
    return mean_z, mean_t, inverse_z, inverse_size(tt, FEATURES, NORMALIZE, EPS)


@triton.jit
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


@triton.jit
def cosine_kernel(
    sums,
    row_weight,
    share,
    losses,
    rows,
    scale,
    splits,
    FEATURES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
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
    cosine = zt * inverse_size(zz, FEATURES, NORMALIZE, EPS) * inverse_size(tt, FEATURES, NORMALIZE, EPS)
    tl.store(losses + row, load_share(share, row, kept, scale) * (1.0 - cosine), mask=row < rows)


@triton.jit
def distance_gradients(
    u,
    v,
    share,
    FEATURES: tl.constexpr,
    COSINE: tl.constexpr,
    MSE: tl.constexpr,
    SMOOTH_L1: tl.constexpr,
):
    """The gradients of u and v, but for infonce's."""
    gap = u - v
    slope = gap * 0.0
    if MSE:
        slope += gap * (2.0 / FEATURES)
    if SMOOTH_L1:
        slope += tl.minimum(tl.maximum(gap, -1.0), 1.0) / FEATURES
    grad_u, grad_v = slope, -slope
    if COSINE:
        grad_u -= v
        grad_v -= u
    return grad_u * share[:, None], grad_v * share[:, None]


@triton.jit
def through_normalization(grad, unit, inverse, total, dot, FEATURES: tl.constexpr, NORMALIZE: tl.constexpr):
    """The gradient of a row from that of its normalised `unit`; total and dot: the sums of grad and of grad * unit."""
    if NORMALIZE == "l2":
        grad = (grad - unit * dot[:, None]) * inverse[:, None]
    if NORMALIZE == "layer":
        grad = (grad - (total[:, None] + unit * dot[:, None]) / FEATURES) * inverse[:, None]
    return grad


@triton.jit
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
    EPS: tl.constexpr,
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
    mean_z, mean_t, inverse_z, inverse_t = find_sizes(
        z, teacher, z_offset, t_offset, kept, FEATURES, NORMALIZE, EPS, ROWS, BLOCK
    )
    GRADIENTS: tl.constexpr = GRAD_Z or grad_teacher is not None
    loss = tl.zeros((ROWS,), dtype=tl.float32)
    total_u, total_v, dot_u, dot_v = loss, loss, loss, loss
    if COSINE:
        loss += 1.0
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
            loss -= tl.sum(u * v, 1)
        if MSE:
            loss += tl.sum(gap * gap, 1) / FEATURES
        if SMOOTH_L1:
            size = tl.abs(gap)
            loss += tl.sum(tl.where(size < 1.0, 0.5 * gap * gap, size - 0.5), 1) / FEATURES
        if GRADIENTS and NORMALIZE != "none":
            du, dv = distance_gradients(u, v, row_share, FEATURES, COSINE, MSE, SMOOTH_L1)
            if grad_u is not None:
                du += load_block(grad_u, z_offset, column, there)
            if grad_v is not None:
                dv += load_block(grad_v, z_offset, column, there)
            total_u, total_v = total_u + tl.sum(du, 1), total_v + tl.sum(dv, 1)
            dot_u, dot_v = dot_u + tl.sum(du * u, 1), dot_v + tl.sum(dv * v, 1)
    tl.store(losses + row, loss * row_share, mask=row < end)
    if GRADIENTS:
        for begin in range(0, FEATURES, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = (column < FEATURES)[None, :]
            there = kept[:, None] & inside
            u = load_block(z, z_offset, column, there)
            v = load_block(teacher, t_offset, column, there)
            u = (u - mean_z[:, None]) * inverse_z[:, None]
            v = (v - mean_t[:, None]) * inverse_t[:, None]
            du, dv = distance_gradients(u, v, row_share, FEATURES, COSINE, MSE, SMOOTH_L1)
            written = (row < end)[:, None] & inside
            if GRAD_Z:
                if grad_u is not None:
                    du += load_block(grad_u, z_offset, column, there)
                dz = through_normalization(du, u, inverse_z, total_u, dot_u, FEATURES, NORMALIZE)
                tl.store(z + z_offset[:, None] + column[None, :], dz.to(z.dtype.element_ty), mask=written)
            if grad_teacher is not None:
                if grad_v is not None:
                    dv += load_block(grad_v, z_offset, column, there)
                dt = through_normalization(dv, v, inverse_t, total_v, dot_v, FEATURES, NORMALIZE)
                target = grad_teacher + row.to(tl.int64)[:, None] * FEATURES + column[None, :]
                tl.store(target, dt.to(grad_teacher.dtype.element_ty), mask=written)


@triton.jit
def normalize_kernel(
    z,
    teacher,
    row_weight,
    unit,
    teacher_stride,
    rows,
    FEATURES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """unit (2, N, Dt): u and v, zero where a row is left out. Grid: (tiles of N,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = find_kept(row_weight, row, rows)
    z_offset, t_offset = row.to(tl.int64) * FEATURES, row.to(tl.int64) * teacher_stride
    mean_z, mean_t, inverse_z, inverse_t = find_sizes(
        z, teacher, z_offset, t_offset, kept, FEATURES, NORMALIZE, EPS, ROWS, BLOCK
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
