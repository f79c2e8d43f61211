// Matrix products of the library, on tensors that are there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../common/tensors.h"

namespace fastprompt {

// out = a b
inline void multiply_into(torch::stable::Tensor out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = scale a b
inline void multiply_into(torch::stable::Tensor out, const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                          double scale) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 0.0, scale));
}

// out += a b
inline void multiply_add_into(torch::stable::Tensor out, const torch::stable::Tensor& a,
                              const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace fastprompt
