// The forward of a run of blocks. Included like tiles.h.

template <typename T, typename A>
void pack_prefix_forward(const Forward<T, A>& call, int64_t entry, int64_t head, int64_t first, int64_t last) {
  pack_prefix<T, A>(call, false, entry, head, first, last);
}

// Turns the scores of one row with keys, `count` of them in whole panels, into weights relative to the greatest so
// far, and updates that and their sum: 2^(unit * difference), since a score times the unit is rounded to its own
// size. Returns the factor that brings earlier weights to the new scale.
template <typename A>
inline A soften(A* score, int64_t count, A unit, A& greatest, A& sum) {
  V<A> top0 = vec(score), top1 = vec(score + kLanes<A>);
  for (int64_t j = kPanel<A>; j < count; j += kPanel<A>) {
    const V<A> x0 = vec(score + j), x1 = vec(score + j + kLanes<A>);
    top0 = x0 > top0 ? x0 : top0;
    top1 = x1 > top1 ? x1 : top1;
  }
  A top = greatest_of<A>(top1 > top0 ? top1 : top0);
  top = top > greatest ? top : greatest;
  const A nothing = -__builtin_inf();
  const A base = top == nothing ? A(0) : top;  // a row that sees nothing yet has weights 2^-inf = 0
  V<A> total0{}, total1{};
  for (int64_t j = 0; j < count; j += kPanel<A>) {
    const V<A> w0 = exp2_nonpositive((vec(score + j) - base) * unit),
               w1 = exp2_nonpositive((vec(score + j + kLanes<A>) - base) * unit);
    vec(score + j) = w0;
    vec(score + j + kLanes<A>) = w1;
    total0 += w0;
    total1 += w1;
  }
  const A total = sum_of<A>(total0 + total1);
  const A factor = greatest == nothing ? A(1) : exp2_nonpositive_scalar((greatest - base) * unit);
  sum = sum * factor + total;
  greatest = top;
  return factor;
}

template <typename A>
int64_t scratch_size(const Problem& problem, int64_t longest, bool backward) {
  const int64_t row_panels = kBlockRows * padded<A>(problem.dim), stride = chunk_keys<A>(problem) + kPanel<A>;
  const int64_t own = prefix_copies(backward) * segment_sum_size<A>(problem, longest);
  if (!backward) return 2 * row_panels + kTileRows * stride + 2 * kBlockRows + own;
  return 3 * row_panels + 2 * kBlockRows * stride + 3 * kBlockRows + own + 2 * segment_sum_size<A>(problem, longest);
}

template <typename T, typename A>
void forward(const Forward<T, A>& call, int64_t head, const Block* first, const Block* last, A* scratch) {
  const Problem& p = call.problem;
  const Segment& segment = p.segments[first->segment];
  const int64_t group = p.group(), row_panels = kBlockRows * padded<A>(p.dim);
  const int64_t chunk = chunk_keys<A>(p), stride = chunk + kPanel<A>;
  const A unit = static_cast<A>(p.unit() * kLog2E), kept_scale = static_cast<A>(1 / (1 - p.dropout_p));
  A* const query = scratch;
  A* const out = query + row_panels;
  A* const score = out + row_panels;
  A* const greatest = score + kTileRows * stride;
  A* const sum = greatest + kBlockRows;
  A* const packed = sum + kBlockRows;
  Part<A> parts[2] = {};
  if (segment.entry >= 0) parts[0] = prefix_part(p, call.packed_prefix, segment.entry, head, false);
  if (segment.key_length > 0) {
    pack_keys<T, A>(call.key.at(segment.key_begin, head), call.key.row_stride, call.value.at(segment.key_begin, head),
                    call.value.row_stride, 0, segment.key_length, segment.key_length, p.dim, false, packed);
    parts[1] = packed_part(false, packed, segment.key_length, p.dim);
  }
  const bool blind = parts[0].keys + parts[1].keys == 0;  // no row sees any key

  for (const Block* block = first; block != last; ++block) {
    const int64_t rows = block->last - block->first;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = segment.begin + (block->first + r) / group, h = head * group + (block->first + r) % group;
      pack_row<T, A>(call.query.at(i, h), p.dim, query, rows, r);
      greatest[r] = -__builtin_inf();
      sum[r] = 0;
    }
    __builtin_memset(out, 0, rows * padded<A>(p.dim) * sizeof(A));

    for (const Part<A>& part : parts)
      for (int64_t begin = 0; begin < part.keys; begin += chunk) {
        const int64_t keys = part.keys - begin < chunk ? part.keys - begin : chunk;
        for (int64_t index = 0; index < tiles_of(rows); ++index) {
          const Tile t = tile(rows, index);
          const Problem::Range top = visible(p, part, block->first + t.begin, begin, keys);
          const Problem::Range bottom = visible(p, part, block->first + t.begin + t.count - 1, begin, keys);
          const Problem::Range seen{top.begin, bottom.end};  // both bounds rise with the row
          if (seen.empty()) continue;
          const int64_t from = seen.begin / kPanel<A>, to = padded<A>(seen.end) / kPanel<A>;
          score_tile(query, rows, t, part.key_transposed + begin * p.dim, p.dim, from, to, score, stride);
          for (int64_t r = 0; r < t.count; ++r) {
            A* const row = score + r * stride;
            A* const begun = row + from * kPanel<A>;
            const int64_t count = (to - from) * kPanel<A>;
            const int64_t in_block = block->first + t.begin + r;
            if (p.softcap > 0) cap_row(p, begun, count);
            if (call.bias.table)
              add_bias(call.bias, head * group + in_block % group,
                       position(p, part) + begin + from * kPanel<A> - in_block / group, begun, count);
            const Problem::Range own = visible(p, part, in_block, begin, keys);
            for (int64_t j = from * kPanel<A>; j < own.begin; ++j) row[j] = -__builtin_inf();
            for (int64_t j = own.end; j < to * kPanel<A>; ++j) row[j] = -__builtin_inf();
            const A factor = soften(begun, count, unit, greatest[t.begin + r], sum[t.begin + r]);
            if (p.dropout_p > 0)
              drop(RowDropout<A>(p, segment, head, in_block), begun, count,
                   first_place(p, part) + begin + from * kPanel<A>);
            if (factor != 1)
              for (int64_t d = 0; d < p.dim; d += kPanel<A>) {
                A* o = out + d * rows + (t.begin + r) * kPanel<A>;
                vec(o) *= factor;
                vec(o + kLanes<A>) *= factor;
              }
          }
          add_weighted(score, stride, t, part.value_columns + begin * kPanel<A>, part.rows, seen, p.dim, out, rows);
        }
      }

    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = segment.begin + (block->first + r) / group, h = head * group + (block->first + r) % group;
      unpack_row<T, A>(out, rows, r, p.dim, call.out.at(i, h), blind ? A(0) : kept_scale / sum[r]);
      call.lse[i * p.heads + h] = static_cast<A>(greatest[r] * p.unit() + __builtin_log(sum[r]));
      call.peak_sum[i * p.heads + h] = {greatest[r], sum[r]};
    }
  }
}
