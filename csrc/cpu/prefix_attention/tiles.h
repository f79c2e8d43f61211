// Register-blocked products, packing and exp2. Included once per instruction set, inside a namespace of its own and
// below the pragma that selects it, so nothing is included here.
//
// Two layouts, both in panels of kPanel columns so that a tile streams its operand:
//   transposed panels of keys   x(j, d) at [j / kPanel][d][j % kPanel]
//   column panels of features   x(r, d) at [d / kPanel][r][d % kPanel], `rows` rows to a panel
// What pads a panel is zero.

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t counts __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using V = typename Vector<A>::type;
template <typename A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);
template <typename A>
constexpr int64_t kPanel = 2 * kLanes<A>;

template <typename A>
inline V<A>& vec(A* aligned) {
  return *reinterpret_cast<V<A>*>(aligned);
}
template <typename A>
inline const V<A>& vec(const A* aligned) {
  return *reinterpret_cast<const V<A>*>(aligned);
}
template <typename A>
inline int64_t padded(int64_t n) {
  return (n + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

// 2^x for x <= 0.
inline V<float> exp2_nonpositive(V<float> x) { return exp2_bounded<Vector<float>::bits>(x); }
inline V<double> exp2_nonpositive(V<double> x) {
  for (int64_t k = 0; k < kLanes<double>; ++k) x[k] = __builtin_exp2(x[k]);
  return x;
}
template <typename A>
inline A exp2_nonpositive_scalar(A x) {
  return exp2_nonpositive(V<A>{} + x)[0];
}

#if __has_builtin(__builtin_shufflevector)
template <int Distance, typename X, size_t... K>
inline X rotated(X x, std::index_sequence<K...>) {
  return __builtin_shufflevector(x, x, ((K + Distance) % sizeof...(K))...);
}
#else
template <int Distance, typename X, size_t... K>
inline X rotated(X x, std::index_sequence<K...>) {
  return X{x[(K + Distance) % sizeof...(K)]...};
}
#endif
template <typename A, int Distance = kLanes<A> / 2>
inline A sum_of(V<A> x) {
  x += rotated<Distance>(x, std::make_index_sequence<kLanes<A>>());
  if constexpr (Distance > 1)
    return sum_of<A, Distance / 2>(x);
  else
    return x[0];
}
template <typename A, int Distance = kLanes<A> / 2>
inline A greatest_of(V<A> x) {
  const V<A> y = rotated<Distance>(x, std::make_index_sequence<kLanes<A>>());
  x = x > y ? x : y;
  if constexpr (Distance > 1)
    return greatest_of<A, Distance / 2>(x);
  else
    return x[0];
}

// out(r, j) = sum_d a(r, d) b(j, d): H rows of column panels times one transposed panel; out has kPanel columns.
template <int H, typename A>
inline void multiply_transposed(const A* a, int64_t a_rows, const A* b, int64_t dim, A* out, int64_t out_stride) {
  V<A> sum[H][2] = {};
  for (int64_t begin = 0; begin < dim; begin += kPanel<A>, a += a_rows * kPanel<A>) {
    const int64_t count = dim - begin < kPanel<A> ? dim - begin : kPanel<A>;
    for (int64_t d = 0; d < count; ++d, b += kPanel<A>) {
      const V<A> b0 = vec(b), b1 = vec(b + kLanes<A>);
#pragma GCC unroll 6
      for (int r = 0; r < H; ++r) {
        const A x = a[r * kPanel<A> + d];
        sum[r][0] += x * b0;
        sum[r][1] += x * b1;
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < H; ++r) {
    vec(out + r * out_stride) = sum[r][0];
    vec(out + r * out_stride + kLanes<A>) = sum[r][1];
  }
}

// out(r, :) += sum_j a(r, j) b(j, :): a(r, j) is a[r * a_row + j * a_step], b and out are one column panel each.
template <int H, typename A>
inline void multiply_add(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t count, A* out) {
  V<A> sum[H][2];
#pragma GCC unroll 6
  for (int r = 0; r < H; ++r) {
    sum[r][0] = vec(out + r * kPanel<A>);
    sum[r][1] = vec(out + r * kPanel<A> + kLanes<A>);
  }
  for (int64_t j = 0; j < count; ++j, b += kPanel<A>, a += a_step) {
    const V<A> b0 = vec(b), b1 = vec(b + kLanes<A>);
#pragma GCC unroll 6
    for (int r = 0; r < H; ++r) {
      const A x = a[r * a_row];
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < H; ++r) {
    vec(out + r * kPanel<A>) = sum[r][0];
    vec(out + r * kPanel<A> + kLanes<A>) = sum[r][1];
  }
}

// Calls F<rows>::run. (Not a lambda: GCC compiles one without the instruction set that a pragma selects.)
template <template <int> class F, typename... Arguments>
inline void with_rows(int64_t rows, Arguments... arguments) {
  switch (rows) {
    case 1:
      return F<1>::run(arguments...);
    case 2:
      return F<2>::run(arguments...);
    case 3:
      return F<3>::run(arguments...);
    case 4:
      return F<4>::run(arguments...);
    case 5:
      return F<5>::run(arguments...);
    default:
      return F<6>::run(arguments...);
  }
}

template <typename T, typename A>
inline V<A> load_as(const T* from) {
  V<A> x;
  for (int64_t k = 0; k < kLanes<A>; ++k) x[k] = static_cast<A>(from[k]);
  return x;
}
template <>
inline V<float> load_as<float, float>(const float* from) {
  V<float> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T, typename A>
inline void store_as(T* to, V<A> x) {
  for (int64_t k = 0; k < kLanes<A>; ++k) to[k] = static_cast<T>(x[k]);
}
template <>
inline void store_as<float, float>(float* to, V<float> x) {
  __builtin_memcpy(to, &x, sizeof(x));
}

template <typename T, typename A>
inline A dot(const T* a, const T* b, int64_t dim) {
  V<A> sum{};
  int64_t d = 0;
  for (; d + kLanes<A> <= dim; d += kLanes<A>) sum += load_as<T, A>(a + d) * load_as<T, A>(b + d);
  A total = sum_of<A>(sum);
  for (; d < dim; ++d) total += static_cast<A>(a[d]) * static_cast<A>(b[d]);
  return total;
}

// Row r of column panels from a row of T.
template <typename T, typename A>
inline void pack_row(const T* from, int64_t dim, A* panels, int64_t rows, int64_t r) {
  A* to = panels + r * kPanel<A>;
  for (int64_t d = 0; d < dim; d += kPanel<A>, from += kPanel<A>, to += rows * kPanel<A>) {
    if (dim - d >= kPanel<A>) {
      vec(to) = load_as<T, A>(from);
      vec(to + kLanes<A>) = load_as<T, A>(from + kLanes<A>);
    } else {
      for (int64_t k = 0; k < kPanel<A>; ++k) to[k] = d + k < dim ? static_cast<A>(from[k]) : A(0);
    }
  }
}

// Row r of column panels, times a factor, to a row of T; added to what is there if `add`.
template <typename T, typename A>
inline void unpack_row(const A* panels, int64_t rows, int64_t r, int64_t dim, T* to, A factor, bool add = false) {
  const A* from = panels + r * kPanel<A>;
  for (int64_t d = 0; d < dim; d += kPanel<A>, from += rows * kPanel<A>) {
    if (dim - d >= kPanel<A>) {
      for (int64_t half = 0; half < kPanel<A>; half += kLanes<A>) {
        const V<A> x = vec(from + half) * factor;
        store_as<T, A>(to + d + half, add ? load_as<T, A>(to + d + half) + x : x);
      }
    } else {
      for (int64_t k = 0; k < dim - d; ++k)
        to[d + k] = static_cast<T>(add ? static_cast<A>(to[d + k]) + from[k] * factor : from[k] * factor);
    }
  }
}

#if __has_builtin(__builtin_shufflevector)
// One step of a transposition: of rows `Step` apart, the blocks off the diagonal are exchanged.
template <int Step, typename X, size_t... K>
inline void exchange(X& a, X& b, std::index_sequence<K...>) {
  constexpr int n = sizeof...(K);
  const X low = __builtin_shufflevector(a, b, (K & Step ? n + K - Step : K)...);
  b = __builtin_shufflevector(a, b, (K & Step ? n + K : K + Step)...);
  a = low;
}
template <int Step, typename A>
inline void transpose_steps(V<A>* x) {
  if constexpr (Step < kLanes<A>) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<A>; ++k)
      if (!(k & Step)) exchange<Step>(x[k], x[k + Step], std::make_index_sequence<kLanes<A>>());
    transpose_steps<2 * Step, A>(x);
  }
}
template <typename A>
inline void transpose(V<A>* x) {
  transpose_steps<1, A>(x);
}
#else
template <typename A>
inline void transpose(V<A>* x) {
  for (int64_t r = 0; r < kLanes<A>; ++r)
    for (int64_t c = 0; c < r; ++c) {
      const A low = x[r][c];
      x[r][c] = x[c][r];
      x[c][r] = low;
    }
}
#endif

// Transposed panels of `count` rows of T.
template <typename T, typename A>
inline void pack_transposed(const T* from, int64_t stride, int64_t count, int64_t dim, A* to) {
  for (int64_t j = 0; j < count; j += kPanel<A>, to += dim * kPanel<A>)
    for (int64_t half = 0; half < kPanel<A>; half += kLanes<A>) {
      const T* rows = from + (j + half) * stride;
      const int64_t there = count - j - half;
      int64_t d = 0;
      if (there >= kLanes<A>) {
        for (; d + kLanes<A> <= dim; d += kLanes<A>) {
          V<A> x[kLanes<A>];
#pragma GCC unroll 16
          for (int64_t k = 0; k < kLanes<A>; ++k) x[k] = load_as<T, A>(rows + k * stride + d);
          transpose<A>(x);
#pragma GCC unroll 16
          for (int64_t k = 0; k < kLanes<A>; ++k) vec(to + (d + k) * kPanel<A> + half) = x[k];
        }
      }
      for (; d < dim; ++d)
        for (int64_t k = 0; k < kLanes<A>; ++k)
          to[d * kPanel<A> + half + k] = k < there ? static_cast<A>(rows[k * stride + d]) : A(0);
    }
}

// Column panels of `count` rows of T, with room for `rows`; those beyond count are left as they are.
template <typename T, typename A>
inline void pack_columns(const T* from, int64_t stride, int64_t count, int64_t dim, A* to, int64_t rows) {
  for (int64_t j = 0; j < count; ++j) pack_row<T, A>(from + j * stride, dim, to, rows, j);
}
