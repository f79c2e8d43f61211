// prefix_attention for CPUs with AVX2 and FMA.
#include "isa.h"

#if FASTPROMPT_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace fastprompt::prefix_attention {
namespace {
constexpr int kVectorBytes = 32;
#include "instance.h"
}  // namespace

template <>
Kernels<float, float> avx2_kernels() {
  return kernels<float, float>();
}
template <>
Kernels<double, double> avx2_kernels() {
  return kernels<double, double>();
}
template <>
Kernels<BFloat16, float> avx2_kernels() {
  return kernels<BFloat16, float>();
}
}  // namespace fastprompt::prefix_attention

#pragma GCC pop_options
#endif
