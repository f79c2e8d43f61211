// prefix_attention on CUDA, for short segments: one launch forward, at most two backward, whatever the lengths.
// bfloat16 and float16, on the tensor cores.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensors.h"
#include "launch.h"
#include "prefix_attention/backward.h"
#include "prefix_attention/forward.h"

namespace fastprompt::prefix_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargestHead = 128;
// Of the backward with a prefix's gradient: enough blocks for the largest GPUs, and the room that their sums may take.
constexpr int64_t kMostBlocks = 512, kMostSumsBytes = int64_t{64} << 20;
constexpr unsigned kSumThreads = 256;

// As the kernels read: rows of 16-byte vectors.
Tensor readable(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  bool aligned = tensor.stride(last) == 1;
  for (int64_t d = 0; d < last; ++d) aligned &= tensor.stride(d) % kVector == 0;
  const Tensor rows = aligned ? tensor : as_contiguous(tensor);
  const bool begins_aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % sizeof(uint4) == 0;
  return begins_aligned ? rows : torch::stable::clone(rows);
}

template <typename T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}
// Of a bank of prefixes, or of rows of which the first are a prompt.
template <typename T>
Bank<T> bank_of(const Tensor& tensor, T* data) {
  if (tensor.dim() == 3) return {data, 0, tensor.stride(1), tensor.stride(0)};
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
template <typename T>
T* pointer_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? tensor.mutable_data_ptr<T>() : nullptr;
}

// The inputs that forward and backward share, in the layout that the kernels read.
struct Inputs {
  Tensor query, key, value, prefix_key, prefix_value, cu_seqlens;
  std::optional<Tensor> prefix_index;
  Problem problem{};

  Inputs(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& prefix_key_,
         const Tensor& prefix_value_, const Tensor& cu_seqlens_, const std::optional<Tensor>& prefix_index_,
         const std::optional<Tensor>& seed, int64_t prompt_rows, bool is_causal, double scale, int64_t window,
         bool prefix_in_window, double softcap, double dropout_p)
      : query(readable(query_)),
        key(readable(key_)),
        value(readable(value_)),
        prefix_key(readable(prefix_key_)),
        prefix_value(readable(prefix_value_)),
        cu_seqlens(as_contiguous(cu_seqlens_)) {
    STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
    STD_TORCH_CHECK(softcap >= 0, "softcap must be positive, or 0 for none, got ", softcap);
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must be in [0, 1), got ", dropout_p);
    STD_TORCH_CHECK(seed.has_value() || dropout_p == 0, "seed must be given with dropout_p > 0");
    const int64_t features = query.size(2);
    STD_TORCH_CHECK(features % 16 == 0 && features <= kLargestHead,
                    "heads must be of a multiple of 16 features, up to ", kLargestHead, ", got ", features);
    problem.has_prompt = prompt_rows > 0;
    if (prefix_index_ && !problem.has_prompt)  // a prompt is one prefix
      problem.prefix_index = Integers(prefix_index.emplace(as_contiguous(*prefix_index_)));
    problem.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
    problem.segments = static_cast<int>(cu_seqlens.size(0) - 1 + problem.has_prompt);
    problem.heads = static_cast<int>(query.size(1));
    problem.kv_heads = static_cast<int>(key.size(1));
    problem.features = static_cast<int>(features);
    problem.entries = problem.has_prompt ? 1 : static_cast<int>(prefix_key.size(0));
    problem.prefix = static_cast<int>(problem.has_prompt ? prompt_rows : prefix_key.size(2));
    const int64_t reach = window < 0 ? kFar : std::min<int64_t>(is_causal ? window - 1 : window, kFar);
    problem.back = static_cast<int>(reach);
    problem.ahead = is_causal ? 0 : problem.back;
    problem.prefix_in_window = prefix_in_window;
    problem.scale = static_cast<float>(scale);
    problem.inverse_softcap = static_cast<float>(softcap > 0 ? 1 / softcap : 0);
    problem.unit = static_cast<float>(softcap > 0 ? softcap : scale);
    problem.seed = seed ? seed->const_data_ptr<int64_t>() : nullptr;
    problem.least = least_kept(dropout_p);
    problem.kept_scale = static_cast<float>(1 / (1 - dropout_p));
  }

  template <typename T, typename Call>
  void hand_to(Call& call) const {
    call.problem = problem;
    call.query = rows_of<T>(query);
    call.key = rows_of<T>(key);
    call.value = rows_of<T>(value);
    const Tensor &keys = problem.has_prompt ? key : prefix_key, &values = problem.has_prompt ? value : prefix_value;
    call.prefix_key = bank_of(keys, keys.const_data_ptr<T>());
    call.prefix_value = bank_of(values, values.const_data_ptr<T>());
  }

  // Calls f with a value of the element type, with the features that a tile holds, zeros among them, and whether there
  // is neither softcap nor dropout. With one of them, which is rare, fewer sizes do.
  template <typename F>
  void dispatch(const F& f) const {
    const bool plain = problem.inverse_softcap == 0 && problem.least == 0;
    const auto with_type = [&](auto zero) {
      if (problem.features <= 32 && plain) return f(zero, std::integral_constant<int, 32>{}, std::true_type{});
      if (problem.features <= 64 && plain) return f(zero, std::integral_constant<int, 64>{}, std::true_type{});
      if (problem.features <= 64) return f(zero, std::integral_constant<int, 64>{}, std::false_type{});
      if (problem.features <= 96 && plain) return f(zero, std::integral_constant<int, 96>{}, std::true_type{});
      if (plain) return f(zero, std::integral_constant<int, kLargestHead>{}, std::true_type{});
      f(zero, std::integral_constant<int, kLargestHead>{}, std::false_type{});
    };
    const ScalarType type = query.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "prefix_attention needs bfloat16 or float16 on CUDA, got ", torch::headeronly::toString(type));
    if (type == ScalarType::BFloat16) return with_type(torch::headeronly::BFloat16{});
    with_type(torch::headeronly::Half{});
  }
};

// What the schema has for other devices alone.
void refuse(const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& cu_seqlens_k) {
  STD_TORCH_CHECK(!relative_bias, "relative_bias must be None on CUDA, where no kernel here adds it, got a tensor");
  STD_TORCH_CHECK(!cu_seqlens_k, "cu_seqlens_k must be None on CUDA, where no kernel here reads it, got a tensor");
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key, const Tensor& prefix_value,
    const Tensor& cu_seqlens, const std::optional<Tensor>& prefix_index, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& cu_seqlens_k, int64_t prompt_rows,
    bool is_causal, double scale, int64_t window, bool prefix_in_window, double softcap, double dropout_p) {
  refuse(relative_bias, cu_seqlens_k);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Inputs inputs(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, prompt_rows,
                      is_causal, scale, window, prefix_in_window, softcap, dropout_p);
  const Problem& problem = inputs.problem;
  const int64_t rows = query.size(0);
  Tensor out = torch::stable::new_empty(query, {rows, problem.heads, problem.features});
  Tensor lse = torch::stable::new_empty(query, {rows, problem.heads}, ScalarType::Float);
  Tensor peak_sum = torch::stable::new_empty(query, {rows, problem.heads, 2}, ScalarType::Float);
  if (rows == 0) return {out, lse, peak_sum};
  inputs.dispatch([&](auto zero, auto features, auto plain) {
    using T = decltype(zero);
    Forward<T> call{};
    inputs.hand_to<T>(call);
    call.out = {out.mutable_data_ptr<T>(), out.stride(0), out.stride(1)};
    call.lse = lse.mutable_data_ptr<float>();
    call.peak_sum = reinterpret_cast<PeakSum*>(peak_sum.mutable_data_ptr<float>());
    const int64_t slots = rows * (problem.heads / problem.kv_heads) / kForwardRows + problem.segments;
    const dim3 blocks(static_cast<unsigned>(slots), problem.kv_heads);
    launch(forward_kernel<T, features, plain>, blocks, kThreads, kForwardBytes<T, features>, current_stream(query),
           call);
  });
  return {out, lse, peak_sum};
}

Tensor gradient_like(const Tensor& tensor, bool wanted) {
  if (!wanted) return torch::stable::new_empty(tensor, {0});
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return torch::stable::new_empty(tensor, sizes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
    const Tensor& prefix_value, const Tensor& out_, const Tensor& peak_sum, const Tensor& cu_seqlens,
    const std::optional<Tensor>& prefix_index, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& cu_seqlens_k, int64_t prompt_rows,
    bool is_causal, double scale, int64_t window, bool prefix_in_window, double softcap, double dropout_p,
    bool needs_query, bool needs_key, bool needs_value, bool needs_prefix_key, bool needs_prefix_value) {
  refuse(relative_bias, cu_seqlens_k);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Inputs inputs(query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, prompt_rows,
                      is_causal, scale, window, prefix_in_window, softcap, dropout_p);
  const Tensor grad = readable(grad_), out = readable(out_);
  const Problem& problem = inputs.problem;
  Tensor grad_query = gradient_like(query, needs_query), grad_key = gradient_like(key, needs_key);
  Tensor grad_value = gradient_like(value, needs_value);
  Tensor grad_prefix_key = gradient_like(prefix_key, needs_prefix_key);
  Tensor grad_prefix_value = gradient_like(prefix_value, needs_prefix_value);

  const int64_t rows = query.size(0);
  const int64_t prefix_count = int64_t{problem.entries} * problem.kv_heads * problem.prefix * problem.features;
  needs_prefix_key = prefix_count > 0 && (problem.has_prompt ? needs_key : needs_prefix_key);
  needs_prefix_value = prefix_count > 0 && (problem.has_prompt ? needs_value : needs_prefix_value);
  const bool needs_prefix = needs_prefix_key || needs_prefix_value;
  int64_t splits = problem.segments;
  if (needs_prefix) {
    const int64_t bytes = (needs_prefix_key + needs_prefix_value) * prefix_count * int64_t{sizeof(float)};
    splits = std::max<int64_t>(1, std::min({splits, kMostBlocks / problem.kv_heads, kMostSumsBytes / bytes}));
  }
  if (splits == 0) return {grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value};
  const auto sums = [&](bool wanted) {
    return torch::stable::new_empty(query, {wanted ? splits * prefix_count : 0}, ScalarType::Float);
  };
  Tensor prefix_key_sums = sums(needs_prefix_key), prefix_value_sums = sums(needs_prefix_value);
  const bool several_tiles = needs_query && rows + problem.prefix > kKeys;
  Tensor query_sums = torch::stable::new_empty(query, {several_tiles ? query.numel() : 0}, ScalarType::Float);
  inputs.dispatch([&](auto zero, auto features, auto plain) {
    using T = decltype(zero);
    Backward<T> call{};
    inputs.hand_to<T>(call);
    call.grad = rows_of<T>(grad);
    call.out = rows_of<T>(out);
    call.peak_sum = reinterpret_cast<const PeakSum*>(peak_sum.const_data_ptr<float>());
    call.grad_query = pointer_or_null<T>(grad_query, needs_query);
    call.grad_key = pointer_or_null<T>(grad_key, needs_key);
    call.grad_value = pointer_or_null<T>(grad_value, needs_value);
    call.query_sums = query_sums.mutable_data_ptr<float>();
    call.prefix_key_sums = pointer_or_null<float>(prefix_key_sums, needs_prefix_key);
    call.prefix_value_sums = pointer_or_null<float>(prefix_value_sums, needs_prefix_value);
    const cudaStream_t stream = current_stream(query);
    launch(backward_kernel<T, features, plain>, dim3(static_cast<unsigned>(splits), problem.kv_heads), kThreads,
           BackwardTiles<T, features>::kBytes, stream, call);
    if (!needs_prefix) return;
    const dim3 blocks(static_cast<unsigned>((prefix_count + kSumThreads - 1) / kSumThreads), 2);
    const auto total = [&](const Tensor& of_rows, const Tensor& of_bank, bool wanted) {
      const Tensor& grads = problem.has_prompt ? of_rows : of_bank;
      return wanted ? bank_of(grads, grads.mutable_data_ptr<T>()) : Bank<T>{};
    };
    launch(sum_splits<T>, blocks, kSumThreads, 0, stream, problem, call.prefix_key_sums, call.prefix_value_sums,
           total(grad_key, grad_prefix_key, needs_prefix_key), total(grad_value, grad_prefix_value, needs_prefix_value),
           static_cast<int>(splits), prefix_count);
  });
  return {grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value};
}

}  // namespace
}  // namespace fastprompt::prefix_attention

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CUDA, library) {
  library.impl("prefix_attention", TORCH_BOX(&fastprompt::prefix_attention::forward));
  library.impl("prefix_attention_backward", TORCH_BOX(&fastprompt::prefix_attention::backward));
}
