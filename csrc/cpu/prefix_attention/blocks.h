// What forward and backward share: where the keys of a block stand, and how its rows are cut into tiles. Included like
// tiles.h.

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

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
inline Problem::Range visible(const Problem& problem, const Part<A>& part, int64_t r, int64_t length, int64_t begin,
                              int64_t count) {
  const int64_t i = r / problem.group();
  const Problem::Range range = part.is_prefix ? problem.prefix_keys(i) : problem.segment_keys(i, length);
  const auto clipped = [&](int64_t j) { return j < begin ? 0 : j - begin < count ? j - begin : count; };
  return {clipped(range.begin), clipped(range.end)};
}

// Computes f(panel) of the score panels [first, last), then hides what each row of the tile does not see.
template <typename A>
inline void score_tile(const A* query, int64_t query_rows, Tile tile, const A* keys, int64_t dim, int64_t first,
                       int64_t last, A* score, int64_t stride) {
  with_rows(tile.count, [&]<int H>() {
    for (int64_t panel = first; panel < last; ++panel)
      multiply_transposed<H>(query + tile.begin * kPanel<A>, query_rows, keys + panel * dim * kPanel<A>, dim,
                             score + panel * kPanel<A>, stride);
  });
}

// out(tile, :) += weight(tile, begin..end) x columns(begin..end, :), all features.
template <typename A>
inline void add_weighted(const A* weight, int64_t stride, Tile tile, const A* columns, int64_t rows,
                         Problem::Range keys, int64_t dim, A* out, int64_t out_rows) {
  with_rows(tile.count, [&]<int H>() {
    for (int64_t d = 0; d < dim; d += kPanel<A>)
      multiply_add<H>(weight + keys.begin, stride, 1, columns + d * rows + keys.begin * kPanel<A>,
                      keys.end - keys.begin, out + d * out_rows + tile.begin * kPanel<A>);
  });
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

template <typename T, typename A>
void pack_keys(const T* key, int64_t key_stride, const T* value, int64_t value_stride, int64_t count, int64_t dim,
               bool backward, A* to, Part<A>& part) {
  const int64_t rows = padded<A>(count), size = rows * padded<A>(dim);
  pack_transposed<T, A>(key, key_stride, count, dim, to);
  part.key_transposed = to;
  if (backward) {
    pack_transposed<T, A>(value, value_stride, count, dim, to + size);
    pack_columns<T, A>(key, key_stride, count, dim, to + 2 * size, rows);
    part.value_transposed = to + size;
    part.key_columns = to + 2 * size;
  } else {
    pack_columns<T, A>(value, value_stride, count, dim, to + size, rows);
    part.value_columns = to + size;
  }
}

template <typename A>
Part<A> prefix_part(const Problem& problem, const A* packed, int64_t entry, int64_t head, bool backward) {
  const int64_t rows = padded<A>(problem.prefix), size = rows * padded<A>(problem.dim);
  const A* at = packed + (entry * problem.kv_heads + head) * prefix_copies(backward) * size;
  return {true, problem.prefix, rows, at, at + size, at + 2 * size, at + size, nullptr, nullptr};
}
