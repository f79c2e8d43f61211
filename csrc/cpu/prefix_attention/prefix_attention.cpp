// prefix_attention on the CPU: the operators. The division of the work is in plan.h; the arithmetic in forward.h and
// backward.h, compiled once per instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../../common/dispatch.h"
#include "../../common/tensors.h"
#include "isa.h"
#include "plan.h"

namespace fastprompt::prefix_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
Kernels<T, accumulate_t<T>> choose_kernels() {
  switch (instruction_set()) {
#if FASTPROMPT_X86
    case InstructionSet::kAvx512:
      return avx512_kernels<T, accumulate_t<T>>();
    case InstructionSet::kAvx2:
      return avx2_kernels<T, accumulate_t<T>>();
#endif
    default:
      return portable_kernels<T, accumulate_t<T>>();
  }
}

Tensor rows_contiguous(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : as_contiguous(tensor);
}

template <typename T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}
template <typename T>
Rows<T> new_rows_of(const Tensor& tensor) {
  return tensor.dim() == 3 ? Rows<T>{tensor.mutable_data_ptr<T>(), tensor.stride(0), tensor.stride(1)} : Rows<T>{};
}

// What a caller hands over, but for the gradient.
struct Arguments {
  const Tensor &query, &key, &value, &prefix_key, &prefix_value, &cu_seqlens;
  const std::optional<Tensor>&prefix_index, &seed, &relative_bias, &cu_seqlens_k;
  int64_t prompt_rows;
  bool is_causal;
  double scale;
  int64_t window;
  bool prefix_in_window;
  double softcap, dropout_p;
};

// The inputs that forward and backward share, in the layout that the kernels read.
struct Inputs {
  Tensor query, key, value, prefix_key, prefix_value;
  std::optional<Tensor> relative_bias;
  int64_t prompt_rows;
  Problem problem;
  Plan plan;

  // The problem points into the plan: made once, not copied.
  explicit Inputs(const Arguments& given)
      : query(rows_contiguous(given.query)),
        key(rows_contiguous(given.key)),
        value(rows_contiguous(given.value)),
        prefix_key(rows_contiguous(given.prefix_key)),
        prefix_value(rows_contiguous(given.prefix_value)),
        relative_bias(given.relative_bias),
        prompt_rows(given.prompt_rows),
        problem{} {
    STD_TORCH_CHECK(given.scale > 0, "scale must be positive, got ", given.scale);
    STD_TORCH_CHECK(given.softcap >= 0, "softcap must be positive, or 0 for none, got ", given.softcap);
    STD_TORCH_CHECK(given.dropout_p >= 0 && given.dropout_p < 1, "dropout_p must be in [0, 1), got ", given.dropout_p);
    STD_TORCH_CHECK(given.seed.has_value() || given.dropout_p == 0, "seed must be given with dropout_p > 0");
    STD_TORCH_CHECK(!given.cu_seqlens_k || !(given.is_causal || given.window >= 0 || prompt_rows || relative_bias),
                    "cu_seqlens_k excludes is_causal, window, prompt_rows and relative_bias");
    STD_TORCH_CHECK(!relative_bias || given.softcap == 0, "relative_bias excludes softcap");
    problem.heads = query.size(1);
    problem.kv_heads = key.size(1);
    problem.dim = query.size(2);
    problem.entries = prompt_rows ? 1 : prefix_key.size(0);
    problem.prefix = prompt_rows ? prompt_rows : prefix_key.size(2);
    problem.is_causal = given.is_causal;
    problem.prefix_in_window = given.prefix_in_window;
    problem.window = given.window;
    problem.scale = given.scale;
    problem.softcap = given.softcap;
    problem.dropout_p = given.dropout_p;
    problem.seed = given.seed ? static_cast<uint64_t>(*given.seed->const_data_ptr<int64_t>()) : 0;
    const auto contiguous = [](const std::optional<Tensor>& tensor) {
      return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
    };
    const Bounds bounds{as_contiguous(given.cu_seqlens), query.size(0), contiguous(given.cu_seqlens_k), key.size(0)};
    plan = make_plan(problem, bounds, contiguous(given.prefix_index), prompt_rows);
  }
  Inputs(const Inputs&) = delete;

  // The memory of RelativeBias, for hand_to. What is finite stays finite, whatever the scale.
  template <typename A>
  Buffer<A> bias_table() const {
    if (!relative_bias) return allocate<A>(0);
    const int64_t columns = relative_bias->size(1), row = columns + 2 * kBiasPad;
    STD_TORCH_CHECK(relative_bias->size(0) == problem.heads && columns % 2 == 1, "relative_bias must be (",
                    problem.heads, ", R), R odd, got (", relative_bias->size(0), ", ", columns, ")");
    const A* const given = relative_bias->const_data_ptr<A>();
    const double most = std::numeric_limits<A>::max();
    Buffer<A> table = allocate<A>(problem.heads * row);
    for (int64_t h = 0; h < problem.heads; ++h)
      for (int64_t c = 0; c < row; ++c) {
        const int64_t column = std::clamp<int64_t>(c - kBiasPad, 0, columns - 1);
        const double bias = given[h * relative_bias->stride(0) + column * relative_bias->stride(1)];
        const double scaled = bias / problem.scale;
        table[h * row + c] = static_cast<A>(std::isfinite(bias) ? std::clamp(scaled, -most, most) : bias);
      }
    return table;
  }

  template <typename T, typename Call, typename A>
  void hand_to(Call& call, const Buffer<A>& bias) const {
    call.bias = {relative_bias ? bias.get() : nullptr, relative_bias ? relative_bias->size(1) : 0};
    call.problem = problem;
    call.query = rows_of<T>(query);
    call.key = rows_of<T>(key);
    call.value = rows_of<T>(value);
    call.prefix_key = bank_of<T>(prefix_key, key);
    call.prefix_value = bank_of<T>(prefix_value, value);
  }

 private:
  template <typename T>
  Bank<const T> bank_of(const Tensor& bank, const Tensor& own_rows) const {
    if (prompt_rows) return {own_rows.const_data_ptr<T>(), 0, own_rows.stride(1), own_rows.stride(0)};
    return {bank.const_data_ptr<T>(), bank.stride(0), bank.stride(1), bank.stride(2)};
  }
};

std::tuple<Tensor, Tensor, Tensor> run_forward(const Arguments& given) {
  const Inputs inputs(given);
  const Tensor& query = given.query;
  const Problem& problem = inputs.problem;
  const Plan& plan = inputs.plan;
  const int64_t rows = query.size(0);
  Tensor out = empty_as(query, {rows, problem.heads, problem.dim});
  const ScalarType type = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor lse = torch::stable::new_empty(query, {rows, problem.heads}, type);
  Tensor peak_sum = torch::stable::new_empty(query, {rows, problem.heads, 2}, type);
  if (rows == 0) return {out, lse, peak_sum};
  dispatch_double_float_bfloat16(query.scalar_type(), "prefix_attention", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Kernels<T, A> kernels = choose_kernels<T>();
    Forward<T, A> call{};
    const Buffer<A> bias = inputs.bias_table<A>();
    inputs.hand_to<T>(call, bias);
    call.out = new_rows_of<T>(out);
    call.lse = lse.mutable_data_ptr<A>();
    call.peak_sum = reinterpret_cast<PeakSum<A>*>(peak_sum.mutable_data_ptr<A>());
    const int64_t prefix_size = kernels.packed_prefix_size(problem, false);
    const Buffer<A> packed = allocate<A>(problem.entries * problem.kv_heads * prefix_size);
    call.packed_prefix = packed.get();
    for_each_prefix(plan, problem, false, [&](auto... which) { kernels.pack_prefix_forward(call, which...); });
    const int64_t splits = plan.splits();
    torch::stable::parallel_for(0, problem.kv_heads * splits, 1, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch = allocate<A>(kernels.scratch_size(problem, plan.longest, false));
      for_each_run(plan, problem, prefix_size * sizeof(A), begin, end,
                   [&](int64_t head, int64_t, const Block* first, const Block* last) {
                     kernels.forward(call, head, first, last, scratch.get());
                   });
    });
  });
  return {out, lse, peak_sum};
}

Tensor gradient_like(const Tensor& tensor, bool wanted, bool zero = false) {
  if (!wanted) return empty_as(tensor, {0});
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return zero ? zeros_as(tensor, sizes) : empty_as(tensor, sizes);
}

struct Needs {
  bool query, key, value, prefix_key, prefix_value;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& grad_, const Arguments& given,
                                                                const Tensor& out, const Tensor& peak_sum,
                                                                const Needs& needs) {
  const Tensor grad = rows_contiguous(grad_);
  const Inputs inputs(given);
  const Problem& problem = inputs.problem;
  const Plan& plan = inputs.plan;
  const bool has_idle = given.cu_seqlens_k.has_value();  // there may be keys whose segment has no row
  Tensor grad_query = gradient_like(given.query, needs.query);
  Tensor grad_key = gradient_like(given.key, needs.key, has_idle);
  Tensor grad_value = gradient_like(given.value, needs.value, has_idle);
  Tensor grad_prefix_key = gradient_like(given.prefix_key, needs.prefix_key);
  Tensor grad_prefix_value = gradient_like(given.prefix_value, needs.prefix_value);
  dispatch_double_float_bfloat16(given.query.scalar_type(), "prefix_attention", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Kernels<T, A> kernels = choose_kernels<T>();
    Backward<T, A> call{};
    const Buffer<A> bias = inputs.bias_table<A>();
    inputs.hand_to<T>(call, bias);
    call.out = rows_of<T>(out);
    call.grad = rows_of<T>(grad);
    call.peak_sum = reinterpret_cast<const PeakSum<A>*>(peak_sum.const_data_ptr<A>());
    call.grad_query = new_rows_of<T>(grad_query);
    call.grad_key = new_rows_of<T>(grad_key);
    call.grad_value = new_rows_of<T>(grad_value);
    call.needs_query = needs.query;
    call.needs_key = needs.key;
    call.needs_value = needs.value;
    call.add_prefix = given.prompt_rows > 0;
    if (call.add_prefix) {
      call.needs_prefix_key = needs.key;
      call.needs_prefix_value = needs.value;
      call.grad_prefix_key = {call.grad_key.data, 0, call.grad_key.head_stride, call.grad_key.row_stride};
      call.grad_prefix_value = {call.grad_value.data, 0, call.grad_value.head_stride, call.grad_value.row_stride};
    } else {
      const auto bank = [](const Tensor& t) {
        return t.dim() == 4 ? Bank<T>{t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)} : Bank<T>{};
      };
      call.needs_prefix_key = needs.prefix_key;
      call.needs_prefix_value = needs.prefix_value;
      call.grad_prefix_key = bank(grad_prefix_key);
      call.grad_prefix_value = bank(grad_prefix_value);
    }
    call.splits = plan.splits();
    const int64_t prefixes = problem.entries * problem.kv_heads;
    const Buffer<A> packed = allocate<A>(prefixes * kernels.packed_prefix_size(problem, true));
    call.packed_prefix = packed.get();
    for_each_prefix(plan, problem, false, [&](auto... which) { kernels.pack_prefix_backward(call, which...); });
    const int64_t prefix_bytes =
        (kernels.packed_prefix_size(problem, true) + 2 * kernels.prefix_sum_size(problem)) * sizeof(A);
    const bool prefix_needs = call.needs_prefix_key || call.needs_prefix_value;
    const int64_t sums = prefix_needs ? call.splits * prefixes * 2 * kernels.prefix_sum_size(problem) : 0;
    const Buffer<A> prefix_sums = allocate<A>(sums);
    torch::stable::parallel_for(0, sums, 1 << 16, [&](int64_t begin, int64_t end) {
      std::fill(prefix_sums.get() + begin, prefix_sums.get() + end, A(0));
    });
    call.prefix_sums = prefix_sums.get();
    const SharedSegments<A> shared(plan, problem, kernels);
    torch::stable::parallel_for(0, problem.kv_heads * call.splits, 1, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch = allocate<A>(kernels.scratch_size(problem, plan.longest, true));
      for_each_run(plan, problem, prefix_bytes, begin, end,
                   [&](int64_t head, int64_t split, const Block* first, const Block* last) {
                     kernels.backward(call, head, split, first, last, shared.part(head, split, first->segment),
                                      scratch.get());
                   });
    });
    if (needs.key || needs.value)
      torch::stable::parallel_for(0, problem.kv_heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head)
          shared.for_each(head, [&](int64_t segment, const std::vector<A*>& parts) {
            kernels.finish_segment(call, segment, head, parts.data(), static_cast<int64_t>(parts.size()));
          });
      });
    if (prefix_needs)
      for_each_prefix(plan, problem, true, [&](auto... which) { kernels.finish_prefix(call, which...); });
  });
  return {grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value};
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key, const Tensor& prefix_value,
    const Tensor& cu_seqlens, const std::optional<Tensor>& prefix_index, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& cu_seqlens_k, int64_t prompt_rows,
    bool is_causal, double scale, int64_t window, bool prefix_in_window, double softcap, double dropout_p) {
  return run_forward({query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, relative_bias,
                      cu_seqlens_k, prompt_rows, is_causal, scale, window, prefix_in_window, softcap, dropout_p});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prefix_key,
    const Tensor& prefix_value, const Tensor& out, const Tensor& peak_sum, const Tensor& cu_seqlens,
    const std::optional<Tensor>& prefix_index, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& cu_seqlens_k, int64_t prompt_rows,
    bool is_causal, double scale, int64_t window, bool prefix_in_window, double softcap, double dropout_p,
    bool needs_query, bool needs_key, bool needs_value, bool needs_prefix_key, bool needs_prefix_value) {
  return run_backward(grad,
                      {query, key, value, prefix_key, prefix_value, cu_seqlens, prefix_index, seed, relative_bias,
                       cu_seqlens_k, prompt_rows, is_causal, scale, window, prefix_in_window, softcap, dropout_p},
                      out, peak_sum, {needs_query, needs_key, needs_value, needs_prefix_key, needs_prefix_value});
}

}  // namespace
}  // namespace fastprompt::prefix_attention

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) {
  library.impl("prefix_attention", TORCH_BOX(&fastprompt::prefix_attention::forward));
  library.impl("prefix_attention_backward", TORCH_BOX(&fastprompt::prefix_attention::backward));
}
