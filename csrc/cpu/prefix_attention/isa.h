// The instruction sets there is code for. Whatever that code includes is included here, above the pragmas: what an
// included header defines must not be compiled for a set that the CPU may lack.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../instruction_set.h"
#include "kernel.h"

namespace fastprompt::prefix_attention {

using torch::headeronly::BFloat16;

template <typename T, typename A>
Kernels<T, A> portable_kernels();
#if FASTPROMPT_X86
template <typename T, typename A>
Kernels<T, A> avx2_kernels();
template <typename T, typename A>
Kernels<T, A> avx512_kernels();
#endif

}  // namespace fastprompt::prefix_attention
