// pack_prompt on CUDA: a block per row, each row written once. Bad indices stop in a device assert, as torch's do.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cassert>
#include <optional>

#include "../common/dispatch.h"
#include "../common/packed_rows.h"
#include "../common/tensors.h"
#include "launch.h"

namespace fastprompt {
namespace {

using torch::stable::Tensor;

constexpr int kVectorBytes = 16;
constexpr int kMaxThreads = 256;

template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T lane[N];
};

// width counts vectors of N elements; prompt_index is (B,) int32 or null.
template <typename T, int N>
__global__ void pack_rows(const Vector<T, N>* table, const Vector<T, N>* bank, Vector<T, N>* hidden, Integers ids,
                          const int32_t* prompt_index, PackedRows packed, bool per_segment, int64_t vocabulary,
                          int64_t bank_size, int64_t tokens, int64_t width, accumulate_t<T> scale) {
  const int64_t row = blockIdx.x;
  int64_t prompt_row = row, token = row - bank_size * packed.prompt_rows;
  if (per_segment) {
    const int64_t segment = packed.segment_of(row), offset = row - packed.begin(segment);
    const int64_t entry = prompt_index ? prompt_index[segment] : 0;
    assert(entry >= 0 && entry < bank_size && "prompt_index out of range");
    prompt_row = entry * packed.prompt_rows + offset;
    token = offset < packed.prompt_rows ? -1 : row - (segment + 1) * packed.prompt_rows;
    assert(offset >= 0 && "cu_seqlens out of range");
  }
  Vector<T, N>* to = hidden + row * width;
  if (token < 0) {
    const Vector<T, N>* from = bank + prompt_row * width;
    for (int64_t e = threadIdx.x; e < width; e += blockDim.x) to[e] = from[e];
    return;
  }
  assert(token < tokens && "cu_seqlens out of range");
  const int64_t id = ids[token];
  assert(id >= 0 && id < vocabulary && "input_ids out of range");
  const Vector<T, N>* from = table + id * width;
  for (int64_t e = threadIdx.x; e < width; e += blockDim.x) {
    Vector<T, N> value = from[e];
#pragma unroll
    for (T& x : value.lane) x = static_cast<T>(static_cast<accumulate_t<T>>(x) * scale);
    to[e] = value;
  }
}

// A block per prompt row; every thread adds up its columns over the segments in their order.
template <typename T, int N>
__global__ void sum_prompt_rows(const Vector<T, N>* grad, Vector<T, N>* grad_prompt, const int32_t* prompt_index,
                                PackedRows packed, int64_t rows, int64_t width) {
  const int64_t entry = blockIdx.x / packed.prompt_rows, offset = blockIdx.x % packed.prompt_rows;
  for (int64_t e = threadIdx.x; e < width; e += blockDim.x) {
    accumulate_t<T> sum[N] = {};
#pragma unroll 4
    for (int64_t b = 0; b < packed.segments; ++b) {
      if ((prompt_index ? prompt_index[b] : 0) != entry) continue;
      const int64_t row = packed.begin(b) + offset;
      assert(row >= 0 && row < rows && "cu_seqlens out of range");
      const Vector<T, N> value = grad[row * width + e];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += static_cast<accumulate_t<T>>(value.lane[i]);
    }
    Vector<T, N> total;
#pragma unroll
    for (int i = 0; i < N; ++i) total.lane[i] = static_cast<T>(sum[i]);
    grad_prompt[blockIdx.x * width + e] = total;
  }
}

// Calls f with the number of elements of T that one access may move: the rows of all tensors must start aligned.
template <typename T, typename F>
void dispatch_vector(int64_t width, std::initializer_list<const void*> pointers, const F& f) {
  bool aligned = width * sizeof(T) % kVectorBytes == 0;
  for (const void* pointer : pointers) aligned &= reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
  if (aligned)
    f(std::integral_constant<int, kVectorBytes / sizeof(T)>{});
  else
    f(std::integral_constant<int, 1>{});
}

int threads_for(int64_t width) { return static_cast<int>(std::min<int64_t>(kMaxThreads, (width + 31) / 32 * 32)); }

std::optional<Tensor> as_int32(const std::optional<Tensor>& index) {
  if (!index) return std::nullopt;
  return as_contiguous(torch::stable::to(*index, torch::headeronly::ScalarType::Int));
}

const int32_t* pointer_or_null(const std::optional<Tensor>& index) {
  return index ? index->const_data_ptr<int32_t>() : nullptr;
}

Tensor pack_prompt(const Tensor& embedding_, const Tensor& input_ids_, const Tensor& cu_seqlens_, const Tensor& prompt_,
                   const std::optional<Tensor>& prompt_index_, bool per_segment, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(embedding_.get_device_index());
  const Tensor embedding = as_contiguous(embedding_), prompt = as_contiguous(prompt_);
  const Tensor input_ids = as_contiguous(input_ids_), cu_seqlens = as_contiguous(cu_seqlens_);
  const std::optional<Tensor> prompt_index = as_int32(prompt_index_);
  const int64_t tokens = input_ids.size(0), width = embedding.size(1);
  const int64_t bank_size = prompt.size(0), prompt_rows = prompt.size(1), segments = cu_seqlens.size(0) - 1;
  const int64_t rows = tokens + prompt_rows * (per_segment ? segments : bank_size);
  Tensor hidden = torch::stable::new_empty(embedding, {rows, width});
  if (rows == 0 || width == 0) return hidden;

  const PackedRows packed{cu_seqlens.const_data_ptr<int32_t>(), segments, prompt_rows};
  dispatch_floating(embedding.scalar_type(), "pack_prompt", [&](auto zero) {
    using T = decltype(zero);
    const T* table = embedding.const_data_ptr<T>();
    const T* bank = prompt.const_data_ptr<T>();
    T* out = hidden.mutable_data_ptr<T>();
    dispatch_vector<T>(width, {table, bank, out}, [&](auto lanes) {
      using V = Vector<T, lanes>;
      const int64_t vectors = width / lanes;
      launch(pack_rows<T, lanes>, dim3(rows), threads_for(vectors), 0, current_stream(hidden),
             reinterpret_cast<const V*>(table), reinterpret_cast<const V*>(bank), reinterpret_cast<V*>(out),
             Integers(input_ids), pointer_or_null(prompt_index), packed, per_segment, embedding.size(0), bank_size,
             tokens, vectors, static_cast<accumulate_t<T>>(scale));
    });
  });
  return hidden;
}

Tensor pack_prompt_backward(const Tensor& grad_, const Tensor& cu_seqlens_, const std::optional<Tensor>& prompt_index_,
                            int64_t bank_size, int64_t prompt_rows) {
  const torch::stable::accelerator::DeviceGuard guard(grad_.get_device_index());
  const Tensor grad = as_contiguous(grad_), cu_seqlens = as_contiguous(cu_seqlens_);
  const std::optional<Tensor> prompt_index = as_int32(prompt_index_);
  const int64_t width = grad.size(1), rows = bank_size * prompt_rows;
  Tensor grad_prompt = torch::stable::new_empty(grad, {bank_size, prompt_rows, width});
  if (rows == 0 || width == 0) return grad_prompt;

  const PackedRows packed{cu_seqlens.const_data_ptr<int32_t>(), cu_seqlens.size(0) - 1, prompt_rows};
  dispatch_floating(grad.scalar_type(), "pack_prompt_backward", [&](auto zero) {
    using T = decltype(zero);
    const T* in = grad.const_data_ptr<T>();
    T* out = grad_prompt.mutable_data_ptr<T>();
    dispatch_vector<T>(width, {in, out}, [&](auto lanes) {
      using V = Vector<T, lanes>;
      const int64_t vectors = width / lanes;
      launch(sum_prompt_rows<T, lanes>, dim3(rows), threads_for(vectors), 0, current_stream(grad),
             reinterpret_cast<const V*>(in), reinterpret_cast<V*>(out), pointer_or_null(prompt_index), packed,
             grad.size(0), vectors);
    });
  });
  return grad_prompt;
}

}  // namespace
}  // namespace fastprompt

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CUDA, library) {
  library.impl("pack_prompt", TORCH_BOX(&fastprompt::pack_prompt));
  library.impl("pack_prompt_backward", TORCH_BOX(&fastprompt::pack_prompt_backward));
}
