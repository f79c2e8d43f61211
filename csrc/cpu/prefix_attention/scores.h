// What a softcap makes of scores, what a bias adds to them, and which weights dropout keeps. Included like tiles.h.

// tanh(x); NaN stays NaN. 1 - 2 / (e^2x + 1) cancels near 0, the polynomial does not.
inline V<float> tanh_of(V<float> x) {
  const V<float> square = x * x;
  V<float> near = square * -0.00570498872745f + 0.0206390887954f;
  near = near * square - 0.0537397155531f;
  near = near * square + 0.133314422036f;
  near = near * square - 0.333332819422f;
  near = near * square * x + x;
  V<float> size = x < 0 ? -x : x;
  size = size > 10 ? V<float>{} + 10 : size;  // 1 in float32 from 9.02 on
  const V<float> power = exp2_nonpositive(size * static_cast<float>(-2 * kLog2E));
  const V<float> far = (1 - power) / (1 + power);
  return size < 0.625f ? near : x < 0 ? -far : far;
}
inline V<double> tanh_of(V<double> x) {
  for (int64_t k = 0; k < kLanes<double>; ++k) x[k] = __builtin_tanh(x[k]);
  return x;
}

// Products of one row with keys become tanh(scale * product / softcap): scores in units of the softcap.
template <typename A>
inline void cap_row(const Problem& problem, A* product, int64_t count) {
  // In this order nothing but infinity, whose tanh is 1, comes of numbers at the edges of the range.
  const A scale = static_cast<A>(problem.scale), inverse = static_cast<A>(1 / problem.softcap);
  for (int64_t j = 0; j < count; j += kLanes<A>) vec(product + j) = tanh_of(vec(product + j) * scale * inverse);
}

// Adds the biases of query head `head` to products of one row with keys, the first of them at `distance`.
template <typename A>
inline void add_bias(const RelativeBias<A>& bias, int64_t head, int64_t distance, A* product, int64_t count) {
  const A* const row = bias.table + head * (bias.columns + 2 * kBiasPad) + kBiasPad;
  int64_t column = distance + bias.columns / 2;
  for (int64_t j = 0; j < count; j += kLanes<A>, column += kLanes<A>) {
    const int64_t from = column < -kBiasPad ? -kBiasPad : column < bias.columns ? column : bias.columns;
    vec(product + j) += load_as<A, A>(row + from);
  }
}

// Dropout of one row.
template <typename A>
struct RowDropout {
  DropoutBits bits;
  int32_t least;
  A scale;  // of what is kept

  // Row `r` of a segment for one key/value head, as in a Block.
  RowDropout(const Problem& problem, const Segment& segment, int64_t head, int64_t r)
      : bits(problem.seed,
             (segment.begin + r / problem.group()) * problem.heads + head * problem.group() + r % problem.group()),
        least(least_kept(problem.dropout_p)),
        scale(static_cast<A>(1 / (1 - problem.dropout_p))) {}

  // `value` where the weight of key + 0, key + 1, ... is kept, else 0.
  V<float> kept(V<float> value, int64_t key) const {
    const auto keys = first_numbers(std::make_index_sequence<kLanes<float>>()) + static_cast<uint32_t>(key);
    const auto below = reinterpret_cast<typename Vector<float>::bits>(bits.of(keys)) < least;
    return below ? V<float>{} : value;
  }
  V<double> kept(V<double> value, int64_t key) const {
    for (int64_t k = 0; k < kLanes<double>; ++k)
      if (static_cast<int32_t>(bits.of(static_cast<uint32_t>(key + k))) < least) value[k] = 0;
    return value;
  }

 private:
  template <size_t... K>
  static typename Vector<float>::counts first_numbers(std::index_sequence<K...>) {
    return typename Vector<float>::counts{K...};
  }
};

// The weights of one row with the keys from `key` on, without those that are dropped; what is kept is not scaled yet.
template <typename A>
inline void drop(const RowDropout<A>& dropout, A* weight, int64_t count, int64_t key) {
  for (int64_t j = 0; j < count; j += kLanes<A>) vec(weight + j) = dropout.kept(vec(weight + j), key + j);
}
