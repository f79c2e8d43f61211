// gated on the CPU: activation and product in one pass, and both gradients in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "../common/dispatch.h"
#include "../common/tensors.h"
#include "rows.h"

namespace fastprompt {
namespace {

using torch::stable::Tensor;

enum Activation { kSilu, kGeluTanh };

// e^x to the last places, and infinity where float has no more. NaN stays NaN. Branchless, so that loops over it
// vectorise.
inline float exponential_or_infinity(float x) {
  const float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  x = x < -87.3f ? -87.3f : x;       // n is -126, and scale 0
  x = x > 89.0f ? 89.0f : x;         // n is 128, and e^x infinite
  const float shifted = x * kLog2E + kMagic, n = shifted - kMagic;
  const float f = (x - n * kLn2High) - n * kLn2Low;   // in [-ln(2) / 2, ln(2) / 2]
  float p = f * 1.9875691500e-4f + 1.3981999507e-3f;  // the polynomial of Cephes' expf
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  // 2^(n - 1): 2^128 has no bits, though half of p 2^128 may be a number.
  const float scale = __builtin_bit_cast(float, (__builtin_bit_cast(int32_t, shifted) << 23) + (126 << 23));
  return p * scale * 2.0f;
}
inline double exponential_or_infinity(double x) { return std::exp(x); }

// Both activations are x sigmoid(v(x)): silu with v(x) = x, and gelu in its tanh approximation with
// v(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3), for (1 + tanh(u)) / 2 = sigmoid(2 u).
template <int Activation, typename A>
struct Sigmoid {
  A value, rest;  // sigmoid(v(x)), and 1 less it, without cancellation
  A slope;        // v'(x)

  explicit Sigmoid(A x) {
    A v = x;
    slope = 1;
    if constexpr (Activation == kGeluTanh) {
      const A kFactor = static_cast<A>(1.5957691216057308), kCubic = static_cast<A>(0.044715);
      const A square = x * x > 1024 ? A(1024) : x * x;  // the sigmoid is 0 or 1 from there on; more would overflow
      v = kFactor * x * (1 + kCubic * square);
      slope = kFactor * (1 + 3 * kCubic * square);
    }
    const A e = exponential_or_infinity(-v), kMost = std::numeric_limits<A>::max();
    value = 1 / (1 + e);
    rest = (e > kMost ? kMost : e) * value;  // 0, not NaN, where the sigmoid is 0: so is what it is multiplied by
  }
};

template <typename F>
void dispatch_activation(int64_t activation, const F& f) {
  if (activation == kSilu) return f(std::integral_constant<int, kSilu>{});
  f(std::integral_constant<int, kGeluTanh>{});
}

Tensor gated(const Tensor& gate_, const Tensor& up_, int64_t activation) {
  const Tensor gate = as_contiguous(gate_), up = as_contiguous(up_);
  Tensor out = torch::stable::empty_like(gate);
  dispatch_double_float_bfloat16(gate.scalar_type(), "gated", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T *x = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    dispatch_activation(activation, [&](auto which) {
      over_ranges(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const A a = static_cast<A>(x[i]);
          const Sigmoid<which(), A> sigmoid(a);
          y[i] = static_cast<T>(a * sigmoid.value * static_cast<A>(u[i]));
        }
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& grad_, const Tensor& gate_, const Tensor& up_,
                                          int64_t activation) {
  const Tensor gate = as_contiguous(gate_), up = as_contiguous(up_);
  const Tensor grad = as_contiguous(grad_);
  Tensor grad_gate = torch::stable::empty_like(gate), grad_up = torch::stable::empty_like(gate);
  dispatch_double_float_bfloat16(gate.scalar_type(), "gated", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T *x = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
    T *dx = grad_gate.mutable_data_ptr<T>(), *du = grad_up.mutable_data_ptr<T>();
    dispatch_activation(activation, [&](auto which) {
      over_ranges(gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const A a = static_cast<A>(x[i]), outer = static_cast<A>(g[i]);
          const Sigmoid<which(), A> sigmoid(a);
          const A product = a * sigmoid.value;
          dx[i] =
              static_cast<T>(outer * static_cast<A>(u[i]) * (sigmoid.value + product * sigmoid.rest * sigmoid.slope));
          du[i] = static_cast<T>(outer * product);
        }
      });
    });
  });
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace fastprompt

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) {
  library.impl("gated", TORCH_BOX(&fastprompt::gated));
  library.impl("gated_backward", TORCH_BOX(&fastprompt::gated_backward));
}
