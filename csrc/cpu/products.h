// Matrix products of the library, on tensors that are there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

namespace fastprompt {

// out = a b
inline void multiply_into(torch::stable::Tensor out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out += a b
inline void multiply_add_into(torch::stable::Tensor out, const torch::stable::Tensor& a,
                              const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

inline torch::stable::Tensor transposed(const torch::stable::Tensor& matrix) {
  return torch::stable::transpose(matrix, 0, 1);
}

// Rows first:first + count, in place.
inline torch::stable::Tensor rows_of(const torch::stable::Tensor& matrix, int64_t first, int64_t count) {
  torch::stable::Tensor source = matrix;
  return torch::stable::narrow(source, 0, first, count);
}

}  // namespace fastprompt
