// Where the rows of a packed hidden state come from. The same on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace fastprompt {

// A contiguous 1-D tensor of int32 or int64.
struct Integers {
  const void* data = nullptr;
  bool wide = false;

  Integers() = default;
  explicit Integers(const torch::stable::Tensor& tensor)
      : data(tensor.const_data_ptr()), wide(tensor.scalar_type() == torch::headeronly::ScalarType::Long) {}

  C10_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Segment b is `prompt_rows` rows of the prompt, then its tokens cu_seqlens[b]:cu_seqlens[b+1].
struct PackedRows {
  const int32_t* cu_seqlens;
  int64_t segments;
  int64_t prompt_rows;

  C10_HOST_DEVICE int64_t begin(int64_t segment) const { return cu_seqlens[segment] + segment * prompt_rows; }

  // The segment that `row` is in: the last one to begin at or before it.
  C10_HOST_DEVICE int64_t segment_of(int64_t row) const {
    int64_t low = 0, high = segments;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (begin(middle) <= row ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace fastprompt
