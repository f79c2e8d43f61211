// prefix_attention for CPUs with AVX-512.
#include "isa.h"

#if FASTPROMPT_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")

namespace fastprompt::prefix_attention {
namespace {
constexpr int kVectorBytes = 64;
#include "instance.h"
}  // namespace

template <>
Kernels<float, float> avx512_kernels() {
  return kernels<float, float>();
}
template <>
Kernels<double, double> avx512_kernels() {
  return kernels<double, double>();
}
template <>
Kernels<BFloat16, float> avx512_kernels() {
  return kernels<BFloat16, float>();
}
}  // namespace fastprompt::prefix_attention

#pragma GCC pop_options
#endif
