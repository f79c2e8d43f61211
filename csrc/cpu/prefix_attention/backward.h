// The backward of a run of blocks. Included like tiles.h.
//
// A block's weights are computed again from its scores, their peak and sum; with w = dO V^T and delta = dO . O,
//   dS = P * (w - delta),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO,
// five products, each only where its result is wanted. With a softcap dS is times the tanh's slope; with dropout w and
// the P of dV are 0 where a weight was dropped, else scaled up. Keys' gradients gather in column panels: a segment's
// over its blocks, the prefix's over all blocks of the item.

template <typename T, typename A>
void pack_prefix_backward(const Backward<T, A>& call, int64_t entry, int64_t head, int64_t first, int64_t last) {
  pack_prefix<T, A>(call, true, entry, head, first, last);
}

// What turns one row's scores into weights and their gradients.
template <typename A>
struct RowWeights {
  A unit, peak, norm, delta;
  bool with_grad, capped;

  // Score becomes P, grad (dO V^T) becomes dS. See soften.
  void differentiate(A* score, A* grad, int64_t count) const {
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      const V<A> weight = at(vec(score + j));
      vec(score + j) = weight;
      if (with_grad) vec(grad + j) = weight * (vec(grad + j) - delta);
    }
  }

  // The same with softcap or dropout, whose keys begin at `key`.
  void differentiate(A* score, A* grad, int64_t count, const RowDropout<A>& dropout, int64_t key) const {
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      const V<A> tanh = vec(score + j), weight = at(tanh);
      vec(score + j) = dropout.kept(weight * dropout.scale, key + j);
      if (!with_grad) continue;
      const V<A> change = weight * (dropout.kept(vec(grad + j) * dropout.scale, key + j) - delta);
      const V<A> slope = 1 - tanh * tanh;  // of hidden keys -infinity
      vec(grad + j) = capped ? change * (slope < 0 ? V<A>{} : slope) : change;
    }
  }

 private:
  V<A> at(V<A> score) const {
    const V<A> below = score - peak;  // however products are rounded this time, none is above the peak
    return exp2_nonpositive((below > 0 ? V<A>{} : below) * unit) * norm;
  }
};

// grad(j, :) += sum over rows r of weight(r, j) x columns(r, :) for `keys` keys.
template <typename A>
inline void add_transposed(const A* weight, int64_t stride, int64_t rows, int64_t keys, const A* columns,
                           int64_t columns_rows, int64_t dim, A* grad, int64_t grad_rows) {
  for (int64_t index = 0; index < tiles_of(keys); ++index) {
    const Tile t = tile(keys, index);
    with_rows<AddWeighted>(t.count, weight + t.begin, int64_t{1}, stride, rows, columns, columns_rows, dim,
                           grad + t.begin * kPanel<A>, grad_rows);
  }
}

// Rows of a block as the backward needs them.
template <typename A>
struct BlockRows {
  int64_t head, rows;
  A *query, *grad, *grad_query;  // column panels
  A *peak, *norm, *delta;        // norm: 1 / the row's sum
  A *score, *grad_score;         // (kBlockRows, stride)
};

template <typename T, typename A>
void backward_part(const Backward<T, A>& call, const Part<A>& part, const Block& block, const BlockRows<A>& b) {
  const Problem& p = call.problem;
  const Segment& segment = p.segments[block.segment];
  const int64_t chunk = chunk_keys<A>(p), stride = chunk + kPanel<A>;
  const int64_t rows = b.rows, tiles = tiles_of(rows);
  const bool with_grad = call.needs_query || part.grad_key;
  const A unit = static_cast<A>(p.unit() * kLog2E);
  for (int64_t begin = 0; begin < part.keys; begin += chunk) {
    const int64_t keys = part.keys - begin < chunk ? part.keys - begin : chunk;
    Problem::Range panels[kBlockRows];  // of each tile
    for (int64_t index = 0; index < tiles; ++index) {
      const Tile t = tile(rows, index);
      const Problem::Range top = visible(p, part, block.first + t.begin, begin, keys);
      const Problem::Range bottom = visible(p, part, block.first + t.begin + t.count - 1, begin, keys);
      const Problem::Range seen{top.begin, bottom.end};  // both bounds rise with the row
      panels[index] = {0, 0};
      if (seen.empty()) continue;
      const int64_t from = seen.begin / kPanel<A>, to = padded<A>(seen.end) / kPanel<A>;
      panels[index] = {from, to};
      A* const score = b.score + t.begin * stride;
      A* const grad_score = b.grad_score + t.begin * stride;
      score_tile(b.query, rows, t, part.key_transposed + begin * p.dim, p.dim, from, to, score, stride);
      if (with_grad)
        score_tile(b.grad, rows, t, part.value_transposed + begin * p.dim, p.dim, from, to, grad_score, stride);
      for (int64_t r = 0; r < t.count; ++r) {
        A* const row = score + r * stride;
        A* const begun = row + from * kPanel<A>;
        const int64_t count = (to - from) * kPanel<A>;
        const int64_t in_block = block.first + t.begin + r, group = p.group();
        if (p.softcap > 0) cap_row(p, begun, count);
        if (call.bias.table)
          add_bias(call.bias, b.head * group + in_block % group,
                   position(p, part) + begin + from * kPanel<A> - in_block / group, begun, count);
        const Problem::Range own = visible(p, part, in_block, begin, keys);
        for (int64_t j = from * kPanel<A>; j < own.begin; ++j) row[j] = -__builtin_inf();
        for (int64_t j = own.end; j < to * kPanel<A>; ++j) row[j] = -__builtin_inf();
        const RowWeights<A> weights{unit,      b.peak[t.begin + r], b.norm[t.begin + r], b.delta[t.begin + r],
                                    with_grad, p.softcap > 0};
        A* const grad = grad_score + r * stride + from * kPanel<A>;
        if (p.softcap > 0 || p.dropout_p > 0)
          weights.differentiate(begun, grad, count, RowDropout<A>(p, segment, b.head, in_block),
                                first_place(p, part) + begin + from * kPanel<A>);
        else
          weights.differentiate(begun, grad, count);
      }
      if (call.needs_query)
        add_weighted(grad_score, stride, t, part.key_columns + begin * kPanel<A>, part.rows, seen, p.dim, b.grad_query,
                     rows);
    }
    if (!part.grad_key && !part.grad_value) continue;
    // The tiles that computed a panel are neighbours, since both bounds of what a row sees rise. Neighbouring panels of
    // the same tiles go together.
    int64_t low = 0, next = 0;
    for (int64_t panel = 0; panel * kPanel<A> < keys; panel = next) {
      next = panel + 1;
      while (low < tiles && panels[low].end <= panel) ++low;
      int64_t high = low;
      while (high < tiles && panels[high].begin <= panel && panel < panels[high].end) ++high;
      if (low == high) continue;
      while (next * kPanel<A> < keys && next < panels[low].end && (high == tiles || next < panels[high].begin)) ++next;
      const int64_t wide = (next * kPanel<A> < keys ? next * kPanel<A> : keys) - panel * kPanel<A>;
      const int64_t row = tile(rows, low).begin, count = tile(rows, high - 1).begin + tile(rows, high - 1).count - row;
      const int64_t at = row * stride + panel * kPanel<A>, key = begin + panel * kPanel<A>;
      if (part.grad_value)
        add_transposed(b.score + at, stride, count, wide, b.grad + row * kPanel<A>, rows, p.dim,
                       part.grad_value + key * kPanel<A>, part.rows);
      if (part.grad_key)
        add_transposed(b.grad_score + at, stride, count, wide, b.query + row * kPanel<A>, rows, p.dim,
                       part.grad_key + key * kPanel<A>, part.rows);
    }
  }
}

template <typename T, typename A>
void finish_segment(const Backward<T, A>& call, int64_t index, int64_t head, A* const* parts, int64_t count) {
  const Problem& p = call.problem;
  const Segment& segment = p.segments[index];
  const int64_t rows = padded<A>(segment.key_length), size = segment_sum_size<A>(p, segment.key_length);
  for (int64_t n = 1; n < count; ++n)
    for (int64_t k = 0; k < 2 * size; k += kLanes<A>) vec(parts[0] + k) += vec(parts[n] + k);
  for (int64_t j = 0; j < segment.key_length; ++j) {
    if (call.needs_key)
      unpack_row<T, A>(parts[0], rows, j, p.dim, call.grad_key.at(segment.key_begin + j, head),
                       static_cast<A>(p.scale));
    if (call.needs_value)
      unpack_row<T, A>(parts[0] + size, rows, j, p.dim, call.grad_value.at(segment.key_begin + j, head), A(1));
  }
}

template <typename T, typename A>
void finish_prefix(const Backward<T, A>& call, int64_t entry, int64_t head, int64_t from, int64_t to) {
  const Problem& p = call.problem;
  const int64_t rows = padded<A>(p.prefix), size = prefix_sum_size<A>(p);
  A* const first = call.prefix_sums + (entry * p.kv_heads + head) * 2 * size;
  for (int64_t split = 1; split < call.splits; ++split) {
    const A* next = first + split * p.entries * p.kv_heads * 2 * size;
    for (int64_t panel = 0; panel < 2 * size; panel += rows * kPanel<A>)
      for (int64_t k = panel + from * kPanel<A>; k < panel + to * kPanel<A>; k += kLanes<A>)
        vec(first + k) += vec(next + k);
  }
  for (int64_t j = from; j < to; ++j) {
    if (call.needs_prefix_key)
      unpack_row<T, A>(first, rows, j, p.dim,
                       call.grad_prefix_key.at(entry, head) + j * call.grad_prefix_key.row_stride,
                       static_cast<A>(p.scale), call.add_prefix);
    if (call.needs_prefix_value)
      unpack_row<T, A>(first + size, rows, j, p.dim,
                       call.grad_prefix_value.at(entry, head) + j * call.grad_prefix_value.row_stride, A(1),
                       call.add_prefix);
  }
}

template <typename T, typename A>
void backward(const Backward<T, A>& call, int64_t head, int64_t split, const Block* first, const Block* last, A* part,
              A* scratch) {
  const Problem& p = call.problem;
  const Segment& segment = p.segments[first->segment];
  const int64_t group = p.group(), row_panels = kBlockRows * padded<A>(p.dim);
  const int64_t stride = chunk_keys<A>(p) + kPanel<A>;
  BlockRows<A> b;
  b.head = head;
  b.query = scratch;
  b.grad = b.query + row_panels;
  b.grad_query = b.grad + row_panels;
  b.score = b.grad_query + row_panels;
  b.grad_score = b.score + kBlockRows * stride;
  b.peak = b.grad_score + kBlockRows * stride;
  b.norm = b.peak + kBlockRows;
  b.delta = b.norm + kBlockRows;
  A* const packed = b.delta + kBlockRows;

  Part<A> parts[2] = {};
  if (segment.entry >= 0) {
    const int64_t size = prefix_sum_size<A>(p);
    A* const sums = call.prefix_sums + ((split * p.entries + segment.entry) * p.kv_heads + head) * 2 * size;
    parts[0] = prefix_part(p, call.packed_prefix, segment.entry, head, true);
    parts[0].grad_key = call.needs_prefix_key ? sums : nullptr;
    parts[0].grad_value = call.needs_prefix_value ? sums + size : nullptr;
  }
  const int64_t size = segment_sum_size<A>(p, segment.key_length);
  A* const sums = part ? part : packed + prefix_copies(true) * size;
  if (segment.key_length > 0 && (call.needs_query || call.needs_key || call.needs_value)) {
    pack_keys<T, A>(call.key.at(segment.key_begin, head), call.key.row_stride, call.value.at(segment.key_begin, head),
                    call.value.row_stride, 0, segment.key_length, segment.key_length, p.dim, true, packed);
    parts[1] = packed_part(false, packed, segment.key_length, p.dim);
    __builtin_memset(sums, 0, 2 * size * sizeof(A));
    parts[1].grad_key = call.needs_key ? sums : nullptr;
    parts[1].grad_value = call.needs_value ? sums + size : nullptr;
  }

  for (const Block* block = first; block != last; ++block) {
    b.rows = block->last - block->first;
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t i = segment.begin + (block->first + r) / group, h = head * group + (block->first + r) % group;
      pack_row<T, A>(call.query.at(i, h), p.dim, b.query, b.rows, r);
      const T* const grad = call.grad.at(i, h);
      pack_row<T, A>(grad, p.dim, b.grad, b.rows, r);
      b.delta[r] = dot<T, A>(grad, call.out.at(i, h), p.dim);
      const PeakSum<A>& of_row = call.peak_sum[i * p.heads + h];
      b.peak[r] = of_row.peak;
      b.norm[r] = A(1) / of_row.sum;
    }
    if (call.needs_query) __builtin_memset(b.grad_query, 0, b.rows * padded<A>(p.dim) * sizeof(A));
    for (const Part<A>& keys : parts)
      if (keys.keys) backward_part(call, keys, *block, b);
    if (call.needs_query)
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t i = segment.begin + (block->first + r) / group, h = head * group + (block->first + r) % group;
        unpack_row<T, A>(b.grad_query, b.rows, r, p.dim, call.grad_query.at(i, h), static_cast<A>(p.scale));
      }
  }
  if (!part && parts[1].keys) finish_segment(call, first->segment, head, &sums, 1);
}
