// pack_prompt on the CPU: one pass that writes every row of the packed hidden state once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../common/dispatch.h"
#include "../common/packed_rows.h"
#include "../common/tensors.h"
#include "checks.h"
#include "grain.h"

namespace fastprompt {
namespace {

using torch::stable::Tensor;

// Bank entry of each segment; 0 where there is no prompt_index.
std::vector<int64_t> bank_entries(const std::optional<Tensor>& prompt_index, int64_t segments, int64_t bank_size) {
  std::vector<int64_t> entries(segments, 0);
  if (prompt_index) {
    const Tensor index = as_contiguous(*prompt_index);
    const Integers values(index);
    check_range(values, segments, bank_size, "prompt_index");
    for (int64_t b = 0; b < segments; ++b) entries[b] = values[b];
  }
  return entries;
}

Tensor pack_prompt(const Tensor& embedding_, const Tensor& input_ids_, const Tensor& cu_seqlens_, const Tensor& prompt_,
                   const std::optional<Tensor>& prompt_index, bool per_segment, double scale) {
  const Tensor embedding = as_contiguous(embedding_), prompt = as_contiguous(prompt_);
  const Tensor input_ids = as_contiguous(input_ids_), cu_seqlens = as_contiguous(cu_seqlens_);
  const int64_t tokens = input_ids.size(0), width = embedding.size(1);
  const int64_t bank_size = prompt.size(0), prompt_rows = prompt.size(1), segments = cu_seqlens.size(0) - 1;
  const PackedRows packed{cu_seqlens.const_data_ptr<int32_t>(), segments, prompt_rows};
  check_segments(packed.cu_seqlens, segments, tokens);
  const Integers ids(input_ids);
  check_range(ids, tokens, embedding.size(0), "input_ids");
  const std::vector<int64_t> entries = bank_entries(prompt_index, segments, bank_size);

  const int64_t rows = tokens + prompt_rows * (per_segment ? segments : bank_size);
  Tensor hidden = empty_as(embedding, {rows, width});
  if (width == 0) return hidden;  // memory that is not there has no address to copy from
  dispatch_floating(embedding.scalar_type(), "pack_prompt", [&](auto zero) {
    using T = decltype(zero);
    const T* table = embedding.const_data_ptr<T>();
    const T* bank = prompt.const_data_ptr<T>();
    T* out = hidden.mutable_data_ptr<T>();
    const auto factor = static_cast<accumulate_t<T>>(scale);
    torch::stable::parallel_for(0, rows, items_per_thread(width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        T* to = out + row * width;
        // The prompt row that stands here, or, beyond the prompt rows, the token.
        int64_t prompt_row = row, token = row - bank_size * prompt_rows;
        if (per_segment) {
          const int64_t segment = packed.segment_of(row), offset = row - packed.begin(segment);
          prompt_row = entries[segment] * prompt_rows + offset;
          token = offset < prompt_rows ? -1 : row - (segment + 1) * prompt_rows;
        }
        const T* from = token < 0 ? bank + prompt_row * width : table + ids[token] * width;
        if (token < 0 || factor == 1) {
          std::memcpy(to, from, width * sizeof(T));
        } else {
          for (int64_t e = 0; e < width; ++e) to[e] = static_cast<T>(static_cast<accumulate_t<T>>(from[e]) * factor);
        }
      }
    });
  });
  return hidden;
}

// grad_prompt[n, p] = sum over the segments that read entry n, in their order, of the gradient of their row p.
Tensor pack_prompt_backward(const Tensor& grad_, const Tensor& cu_seqlens_, const std::optional<Tensor>& prompt_index,
                            int64_t bank_size, int64_t prompt_rows) {
  const Tensor grad = as_contiguous(grad_), cu_seqlens = as_contiguous(cu_seqlens_);
  const int64_t width = grad.size(1), segments = cu_seqlens.size(0) - 1;
  const PackedRows packed{cu_seqlens.const_data_ptr<int32_t>(), segments, prompt_rows};
  check_segments(packed.cu_seqlens, segments, grad.size(0) - segments * prompt_rows);
  const std::vector<int64_t> entries = bank_entries(prompt_index, segments, bank_size);

  Tensor grad_prompt = empty_as(grad, {bank_size, prompt_rows, width});
  dispatch_floating(grad.scalar_type(), "pack_prompt_backward", [&](auto zero) {
    using T = decltype(zero);
    const T* in = grad.const_data_ptr<T>();
    T* out = grad_prompt.mutable_data_ptr<T>();
    const int64_t grain = items_per_thread(width * std::max<int64_t>(1, segments));
    torch::stable::parallel_for(0, bank_size * prompt_rows, grain, [&](int64_t first, int64_t last) {
      std::vector<accumulate_t<T>> sum(width);
      for (int64_t row = first; row < last; ++row) {
        const int64_t entry = row / prompt_rows, offset = row % prompt_rows;
        std::fill(sum.begin(), sum.end(), accumulate_t<T>{0});
        for (int64_t b = 0; b < segments; ++b) {
          if (entries[b] != entry) continue;
          const T* from = in + (packed.begin(b) + offset) * width;
          for (int64_t e = 0; e < width; ++e) sum[e] += static_cast<accumulate_t<T>>(from[e]);
        }
        for (int64_t e = 0; e < width; ++e) out[row * width + e] = static_cast<T>(sum[e]);
      }
    });
  });
  return grad_prompt;
}

}  // namespace
}  // namespace fastprompt

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) {
  library.impl("pack_prompt", TORCH_BOX(&fastprompt::pack_prompt));
  library.impl("pack_prompt_backward", TORCH_BOX(&fastprompt::pack_prompt_backward));
}
