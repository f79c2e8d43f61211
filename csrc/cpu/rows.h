// Plain loops over rows and their elements, which any compiler vectorises.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>

#include "grain.h"
#include "instruction_set.h"

namespace fastprompt {

#include "exp2.h"

constexpr int64_t kLanes = 32;  // partial sums, so that additions do not wait for each other

// sums[k] = sum over i of what f(i, add) hands to add(k, ...), in a fixed order.
template <int Sums, typename A, typename F>
inline void add_up(int64_t count, A (&sums)[Sums], const F& f) {
  A lanes[Sums][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) f(i + k, [&](int sum, A value) { lanes[sum][k] += value; });
  for (; i < count; ++i) f(i, [&](int sum, A value) { lanes[sum][i % kLanes] += value; });
  for (int sum = 0; sum < Sums; ++sum) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; ++k) lanes[sum][k] += lanes[sum][k + half];
    sums[sum] = lanes[sum][0];
  }
}

#if FASTPROMPT_X86
template <typename F>
__attribute__((target("avx2,fma"), flatten)) void run_with_avx2(const F& f, int64_t begin, int64_t end) {
  f(begin, end);
}
#endif

// f(begin, end) for ranges that divide 0:count among threads. What it calls is inlined and so compiled for AVX2 as
// well, and that is run where the CPU has it; more gains nothing where memory is the limit.
template <typename F>
void over_ranges(int64_t count, int64_t grain, const F& f) {
  [[maybe_unused]] const bool wide = instruction_set() != InstructionSet::kPortable;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
#if FASTPROMPT_X86
    if (wide) return run_with_avx2(f, begin, end);
#endif
    f(begin, end);
  });
}

// f(i) for every row i of `count` rows of `width` elements.
template <typename F>
void over_rows(int64_t count, int64_t width, const F& f) {
  over_ranges(count, items_per_thread(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// e^x for x <= 88.
inline float exponential(float x) { return exp2_bounded<int32_t>(x * 1.44269504f); }
inline double exponential(double x) { return std::exp(x); }

}  // namespace fastprompt
