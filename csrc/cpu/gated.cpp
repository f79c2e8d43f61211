// gated on the CPU: activation and product in one pass, and both gradients in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <tuple>

#include "../common/dispatch.h"
#include "../common/tensors.h"
#include "rows.h"

namespace fastprompt {
namespace {

using torch::stable::Tensor;

enum Activation { kSilu, kGeluTanh };

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
      v = kFactor * x * (1 + kCubic * x * x);
      slope = kFactor * (1 + 3 * kCubic * x * x);
    }
    v = v < -80 ? A(-80) : v;  // sigmoid(-80) is 2e-35
    const A e = exponential(-v);
    value = 1 / (1 + e);
    rest = e * value;
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
