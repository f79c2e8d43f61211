// rms_norm on the CPU: one row after the other, which stays in the first cache between its sum and its product.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>

#include "../common/dispatch.h"
#include "../common/tensors.h"
#include "rows.h"

namespace fastprompt {
namespace {

using torch::stable::Tensor;

Tensor rms_norm(const Tensor& x_, const Tensor& weight_, double eps, double offset) {
  const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
  Tensor out = torch::stable::empty_like(x);
  const int64_t width = weight.size(0), rows = width ? x.numel() / width : 0;
  dispatch_double_float_bfloat16(x.scalar_type(), "rms_norm", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    over_rows(rows, width, [&](int64_t row) {
      const T* a = in + row * width;
      T* y = to + row * width;
      A square[1];
      add_up(width, square, [&](int64_t i, auto add) { add(0, static_cast<A>(a[i]) * static_cast<A>(a[i])); });
      const A factor = 1 / std::sqrt(square[0] / static_cast<A>(width) + static_cast<A>(eps));
      for (int64_t i = 0; i < width; ++i)
        y[i] = static_cast<T>(static_cast<A>(a[i]) * factor * (static_cast<A>(offset) + static_cast<A>(w[i])));
    });
  });
  return out;
}

// With r = 1 / sqrt(mean(x^2) + eps) and h = (offset + weight) grad: dx = r h - r^3 mean(h x) x. r is found again: that
// costs less than keeping it.
Tensor rms_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight_, double eps, double offset) {
  const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
  const Tensor grad = as_contiguous(grad_);
  Tensor out = torch::stable::empty_like(x);
  const int64_t width = weight.size(0), rows = width ? x.numel() / width : 0;
  dispatch_double_float_bfloat16(x.scalar_type(), "rms_norm", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>(), *outer = grad.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    over_rows(rows, width, [&](int64_t row) {
      const T *a = in + row * width, *g = outer + row * width;
      T* dx = to + row * width;
      const auto h = [&](int64_t i) { return static_cast<A>(g[i]) * (static_cast<A>(offset) + static_cast<A>(w[i])); };
      A sums[2];
      add_up(width, sums, [&](int64_t i, auto add) {
        add(0, static_cast<A>(a[i]) * static_cast<A>(a[i]));
        add(1, h(i) * static_cast<A>(a[i]));
      });
      const A n = static_cast<A>(width), factor = 1 / std::sqrt(sums[0] / n + static_cast<A>(eps));
      const A along = factor * factor * factor * sums[1] / n;
      for (int64_t i = 0; i < width; ++i) dx[i] = static_cast<T>(factor * h(i) - along * static_cast<A>(a[i]));
    });
  });
  return out;
}

}  // namespace
}  // namespace fastprompt

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&fastprompt::rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&fastprompt::rms_norm_backward));
}
