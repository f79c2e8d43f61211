// What forward and backward share: where the keys of a block stand, and how its rows are cut into tiles. Included like
// tiles.h.

constexpr double kLog2E = 1.4426950408889634;

// Keys that a block reads: the packed prefix, or the packed rows of its own segment.
template <typename A>
struct Part {
  bool is_prefix;
  int64_t keys, rows;  // keys there are, and rows of a column panel
  const A *key_transposed, *value_transposed, *key_columns, *value_columns;  // those that the pass needs
  A *grad_key, *grad_value;  // column panels, or null where no gradient is wanted
};

template <typename A>
inline int64_t chunk_keys(const Problem& problem) {
  const int64_t fits = kChunkElements / padded<A>(problem.dim) / kPanel<A> * kPanel<A>;
  return fits < kPanel<A> ? kPanel<A> : fits > 512 ? 512 : fits;
}

// Rows [begin, begin + count) of a block: six, or as near to it as an even division gives.
struct Tile {
  int64_t begin, count;
};
inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline Tile tile(int64_t rows, int64_t index) {
  const int64_t tiles = tiles_of(rows), begin = rows * index / tiles;
  return {begin, rows * (index + 1) / tiles - begin};
}

// What of a chunk row `r` of the block's segment sees, counted from the chunk's beginning.
template <typename A>
inline Problem::Range visible(const Problem& problem, const Part<A>& part, int64_t r, int64_t begin, int64_t count) {
  const int64_t i = r / problem.group();
  const Problem::Range range = part.is_prefix ? problem.prefix_keys(i) : problem.segment_keys(i, part.keys);
  const auto clipped = [&](int64_t j) { return j < begin ? 0 : j - begin < count ? j - begin : count; };
  return {clipped(range.begin), clipped(range.end)};
}

// Place of a part's first key among all keys of a row.
template <typename A>
inline int64_t first_place(const Problem& problem, const Part<A>& part) {
  return part.is_prefix ? 0 : problem.prefix;
}

// Position of a part's first key, as its segment's rows count theirs from 0.
template <typename A>
inline int64_t position(const Problem& problem, const Part<A>& part) {
  return part.is_prefix ? -problem.prefix : 0;
}

// score(tile, :) = query(tile, :) x keys^T for the transposed panels [first, last).
template <int H>
struct Score {
  template <typename A>
  static void run(const A* query, int64_t query_rows, const A* keys, int64_t dim, int64_t first, int64_t last, A* score,
                  int64_t stride) {
    for (int64_t panel = first; panel < last; ++panel)
      multiply_transposed<H>(query, query_rows, keys + panel * dim * kPanel<A>, dim, score + panel * kPanel<A>, stride);
  }
};
template <typename A>
inline void score_tile(const A* query, int64_t query_rows, Tile tile, const A* keys, int64_t dim, int64_t first,
                       int64_t last, A* score, int64_t stride) {
  with_rows<Score>(tile.count, query + tile.begin * kPanel<A>, query_rows, keys, dim, first, last, score, stride);
}

// out(r, :) += sum over j < count of weight(r, j) x columns(j, :), all features; weight(r, j) is
// weight[r * row + j * step], columns and out are column panels.
template <int H>
struct AddWeighted {
  template <typename A>
  static void run(const A* weight, int64_t row, int64_t step, int64_t count, const A* columns, int64_t rows,
                  int64_t dim, A* out, int64_t out_rows) {
    for (int64_t d = 0; d < dim; d += kPanel<A>)
      multiply_add<H>(weight, row, step, columns + d * rows, count, out + d * out_rows);
  }
};
template <typename A>
inline void add_weighted(const A* weight, int64_t stride, Tile tile, const A* columns, int64_t rows,
                         Problem::Range keys, int64_t dim, A* out, int64_t out_rows) {
  with_rows<AddWeighted>(tile.count, weight + keys.begin, stride, int64_t{1}, keys.end - keys.begin,
                         columns + keys.begin * kPanel<A>, rows, dim, out + tile.begin * kPanel<A>, out_rows);
}

// The packed prefix of an entry and head: transposed keys and value columns; for the backward, transposed values and
// key columns as well (which needs no value columns).
inline int64_t prefix_copies(bool backward) { return backward ? 3 : 2; }
template <typename A>
int64_t packed_prefix_size(const Problem& problem, bool backward) {
  return prefix_copies(backward) * padded<A>(problem.prefix) * padded<A>(problem.dim);
}
template <typename A>
int64_t prefix_sum_size(const Problem& problem) {
  return padded<A>(problem.prefix) * padded<A>(problem.dim);
}
template <typename A>
int64_t segment_sum_size(const Problem& problem, int64_t length) {
  return padded<A>(length) * padded<A>(problem.dim);
}

// Packs keys [first, last) of `count`; first is a multiple of kPanel.
template <typename T, typename A>
void pack_keys(const T* key, int64_t key_stride, const T* value, int64_t value_stride, int64_t first, int64_t last,
               int64_t count, int64_t dim, bool backward, A* to) {
  const int64_t rows = padded<A>(count), size = rows * padded<A>(dim), keys = last - first;
  key += first * key_stride;
  value += first * value_stride;
  pack_transposed<T, A>(key, key_stride, keys, dim, to + first * dim);
  to += size;
  if (backward) {
    pack_transposed<T, A>(value, value_stride, keys, dim, to + first * dim);
    to += size;
    pack_columns<T, A>(key, key_stride, keys, dim, to + first * kPanel<A>, rows);
  } else {
    pack_columns<T, A>(value, value_stride, keys, dim, to + first * kPanel<A>, rows);
  }
}

// Keys [first, last) of the prefix of an entry and head.
template <typename T, typename A, typename Call>
void pack_prefix(const Call& call, bool backward, int64_t entry, int64_t head, int64_t first, int64_t last) {
  const Problem& p = call.problem;
  pack_keys<T, A>(call.prefix_key.at(entry, head), call.prefix_key.row_stride, call.prefix_value.at(entry, head),
                  call.prefix_value.row_stride, first, last, p.prefix, p.dim, backward,
                  call.packed_prefix + (entry * p.kv_heads + head) * packed_prefix_size<A>(p, backward));
}

// The part that stands packed at `at`.
template <typename A>
Part<A> packed_part(bool is_prefix, const A* at, int64_t keys, int64_t dim) {
  const int64_t rows = padded<A>(keys), size = rows * padded<A>(dim);
  return {is_prefix, keys, rows, at, at + size, at + 2 * size, at + size, nullptr, nullptr};
}

template <typename A>
Part<A> prefix_part(const Problem& problem, const A* packed, int64_t entry, int64_t head, bool backward) {
  const A* at = packed + (entry * problem.kv_heads + head) * packed_prefix_size<A>(problem, backward);
  return packed_part(true, at, problem.prefix, problem.dim);
}
