// prefix_attention for every CPU: vectors of 16 bytes, which are SSE2 on x86-64 and NEON on ARM.
#include "isa.h"

namespace fastprompt::prefix_attention {
namespace {
constexpr int kVectorBytes = 16;
#include "instance.h"
}  // namespace

template <>
Kernels<float, float> portable_kernels() {
  return kernels<float, float>();
}
template <>
Kernels<double, double> portable_kernels() {
  return kernels<double, double>();
}
template <>
Kernels<BFloat16, float> portable_kernels() {
  return kernels<BFloat16, float>();
}
}  // namespace fastprompt::prefix_attention
