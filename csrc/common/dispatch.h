// Calls a generic function with a value of the element type that a tensor holds.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace fastprompt {

// What sums and products of T are computed in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

template <typename F>
void dispatch_double_float_bfloat16(torch::headeronly::ScalarType type, const char* name, const F& f) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, name, " is not implemented for ", torch::headeronly::toString(type));
  }
}

template <typename F>
void dispatch_floating(torch::headeronly::ScalarType type, const char* name, const F& f) {
  if (type == torch::headeronly::ScalarType::Half) return f(torch::headeronly::Half{});
  dispatch_double_float_bfloat16(type, name, f);
}

}  // namespace fastprompt
