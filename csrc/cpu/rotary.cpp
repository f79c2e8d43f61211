// rotary on the CPU: query and key in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "../common/dispatch.h"
#include "../common/tensors.h"
#include "rows.h"

namespace fastprompt {
namespace {

using torch::stable::Tensor;

Tensor features_contiguous(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Heads of rows: element (t, h, d) is data[t * row + h * head + d].
template <typename T>
struct Heads {
  T* data;
  int64_t row, head, count;
};

template <typename T>
Heads<const T> heads_of(const Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.size(1)};
}
template <typename T>
Heads<T> new_heads_of(const Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.size(1)};
}

// Each pair (x_d, x_{d + D/2}) of a row turned by the angle of d.
template <typename T, typename A>
void rotate_row(const Heads<const T>& x, const Heads<T>& out, int64_t row, const T* cos, const T* sin, A sign,
                int64_t half) {
  for (int64_t head = 0; head < x.count; ++head) {
    const T* from = x.data + row * x.row + head * x.head;
    T* to = out.data + row * out.row + head * out.head;
    for (int64_t d = 0; d < half; ++d) {
      const A first = static_cast<A>(from[d]), second = static_cast<A>(from[d + half]);
      const A c = static_cast<A>(cos[d]), s = sign * static_cast<A>(sin[d]);
      to[d] = static_cast<T>(first * c - second * s);
      to[d + half] = static_cast<T>(second * c + first * s);
    }
  }
}

std::tuple<Tensor, Tensor> rotary(const Tensor& query_, const Tensor& key_, const Tensor& cos_, const Tensor& sin_,
                                  bool inverse) {
  const Tensor query = features_contiguous(query_), key = features_contiguous(key_);
  const Tensor cos = features_contiguous(cos_), sin = features_contiguous(sin_);
  const int64_t rows = query.size(0), dim = query.size(2);
  Tensor out_query = empty_as(query, {rows, query.size(1), dim});
  Tensor out_key = empty_as(key, {rows, key.size(1), dim});
  dispatch_double_float_bfloat16(query.scalar_type(), "rotary", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const A sign = inverse ? A(-1) : A(1);
    const Heads<const T> from_query = heads_of<T>(query), from_key = heads_of<T>(key);
    const Heads<T> to_query = new_heads_of<T>(out_query), to_key = new_heads_of<T>(out_key);
    const T *cosines = cos.const_data_ptr<T>(), *sines = sin.const_data_ptr<T>();
    const int64_t cos_row = cos.stride(0), sin_row = sin.stride(0);
    over_rows(rows, (query.size(1) + key.size(1)) * dim, [&](int64_t row) {
      const T *c = cosines + row * cos_row, *s = sines + row * sin_row;
      rotate_row(from_query, to_query, row, c, s, sign, dim / 2);
      rotate_row(from_key, to_key, row, c, s, sign, dim / 2);
    });
  });
  return {out_query, out_key};
}

}  // namespace
}  // namespace fastprompt

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) { library.impl("rotary", TORCH_BOX(&fastprompt::rotary)); }
