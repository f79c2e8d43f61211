// What torch::stable has too, but asks the dispatcher for by name: a small operator then spends more on that than on
// its work.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace fastprompt {

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Of like's dtype and on its device, not initialised.
inline torch::stable::Tensor empty_as(const torch::stable::Tensor& like,
                                      torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int32_t dtype, device, index, layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype,
                                                   &layout, &device, index, nullptr, &made));
  return torch::stable::Tensor(made);
}

inline torch::stable::Tensor zeros_as(const torch::stable::Tensor& like,
                                      torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  torch::stable::Tensor made = empty_as(like, sizes);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(made.get()));
  return made;
}

// A matrix on the same memory, `offset` elements further than the tensor begins (not its storage: that is how the
// function counts, whatever its header calls the argument).
inline torch::stable::Tensor view_as_matrix(const torch::stable::Tensor& tensor, int64_t offset, int64_t rows,
                                            int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, offset, &view));
  return torch::stable::Tensor(view);
}

inline torch::stable::Tensor transposed(const torch::stable::Tensor& matrix) {
  return view_as_matrix(matrix, 0, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

// Rows first:first + count, in place.
inline torch::stable::Tensor rows_of(const torch::stable::Tensor& matrix, int64_t first, int64_t count) {
  return view_as_matrix(matrix, first * matrix.stride(0), count, matrix.size(1), matrix.stride(0), matrix.stride(1));
}

}  // namespace fastprompt
