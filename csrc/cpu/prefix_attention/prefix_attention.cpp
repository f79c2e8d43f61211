// prefix_attention on the CPU: division of the work, and the operators. The arithmetic is in forward.h and backward.h,
// compiled once per instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../../common/dispatch.h"
#include "../checks.h"
#include "isa.h"

namespace fastprompt::prefix_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// FASTPROMPT_CPU=portable|avx2|avx512 takes less than the CPU has, for tests and for measuring.
template <typename T>
Kernels<T, accumulate_t<T>> choose_kernels() {
#if FASTPROMPT_X86
  const char* forced = std::getenv("FASTPROMPT_CPU");
  const std::string limit = forced ? forced : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (limit == "avx512" && avx512) return avx512_kernels<T, accumulate_t<T>>();
  if (limit != "portable" && avx2) return avx2_kernels<T, accumulate_t<T>>();
#endif
  return portable_kernels<T, accumulate_t<T>>();
}

template <typename A>
using Buffer = std::unique_ptr<A[], decltype(&std::free)>;

template <typename A>
Buffer<A> allocate(int64_t count) {
  constexpr size_t kAlignment = 64;
  const size_t bytes = (count * sizeof(A) + kAlignment) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (!memory) throw std::bad_alloc();
  return {static_cast<A*>(memory), &std::free};
}

// The segments of a call, their rows in blocks, and the blocks in runs of about equal work.
struct Plan {
  std::vector<Segment> segments;
  std::vector<Block> blocks;  // of one key/value head; the same for each
  std::vector<int64_t> cuts;  // split s is blocks cuts[s]:cuts[s+1]
  int64_t longest = 0;

  int64_t splits() const { return static_cast<int64_t>(cuts.size()) - 1; }
};

void add_segments(Plan& plan, const Tensor& cu_seqlens, const std::optional<Tensor>& prefix_index, int64_t rows,
                  int64_t entries, int64_t prompt_rows) {
  const int32_t* bounds = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t count = cu_seqlens.size(0) - 1;
  check_segments(bounds, count, rows - prompt_rows);
  if (prefix_index) check_range(Integers(*prefix_index), count, entries, "prefix_index");
  if (prompt_rows) plan.segments.push_back({0, prompt_rows, -1});
  for (int64_t b = 0; b < count; ++b) {
    const int64_t entry = prefix_index ? Integers(*prefix_index)[b] : 0;
    plan.segments.push_back({prompt_rows + bounds[b], bounds[b + 1] - bounds[b], entry});
  }
}

Plan make_plan(Problem& problem, const Tensor& cu_seqlens, const std::optional<Tensor>& prefix_index, int64_t rows,
               int64_t prompt_rows) {
  Plan plan;
  add_segments(plan, cu_seqlens, prefix_index, rows, problem.entries, prompt_rows);
  problem.segments = plan.segments.data();
  // Blocks as large as leaves each thread two of them.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = rows * problem.heads / (2 * threads);
  const int64_t block_rows = std::clamp((share + kTileRows - 1) / kTileRows * kTileRows, kBlockRows / 4, kBlockRows);
  std::vector<int64_t> cost{0};  // of the blocks so far, in rows times keys
  for (size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    plan.longest = std::max(plan.longest, segment.length);
    const int64_t group_rows = segment.length * problem.group();
    const int64_t count = (group_rows + block_rows - 1) / block_rows;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t first = group_rows * n / count, last = group_rows * (n + 1) / count;
      plan.blocks.push_back({static_cast<int32_t>(s), static_cast<int32_t>(first), static_cast<int32_t>(last)});
      const Problem::Range keys = problem.segment_keys((first + last) / 2 / problem.group(), segment.length);
      const int64_t prefix = segment.entry < 0 ? 0 : problem.prefix;
      cost.push_back(cost.back() + (last - first) * (keys.end - keys.begin + prefix + problem.dim / 8));
    }
  }
  // As few splits as give each thread its share: a split of the backward has sums of the prefix's gradient of its own.
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
  int64_t splits = 1;
  while (splits < blocks && problem.kv_heads * splits % threads != 0 && problem.kv_heads * splits < 8 * threads)
    ++splits;
  for (int64_t s = 0; s <= splits; ++s) {
    const int64_t share = cost.back() * s / splits;
    int64_t cut = std::lower_bound(cost.begin(), cost.end(), share) - cost.begin();
    if (cut > 0 && share - cost[cut - 1] < cost[cut] - share) --cut;  // the nearest
    plan.cuts.push_back(cut);
  }
  return plan;
}

Tensor rows_contiguous(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}
template <typename T>
Rows<T> new_rows_of(const Tensor& tensor) {
  return tensor.dim() == 3 ? Rows<T>{tensor.mutable_data_ptr<T>(), tensor.stride(0), tensor.stride(1)} : Rows<T>{};
}
template <typename T>
Bank<const T> bank_of(const Tensor& tensor, const Tensor& own_rows, int64_t prompt_rows) {
  if (prompt_rows) return {own_rows.const_data_ptr<T>(), 0, own_rows.stride(1), own_rows.stride(0)};
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& prefix_key, int64_t prompt_rows,
                   bool is_causal, double scale, int64_t window, bool prefix_in_window) {
  Problem problem{};
  problem.heads = query.size(1);
  problem.kv_heads = key.size(1);
  problem.dim = query.size(2);
  problem.entries = prompt_rows ? 1 : prefix_key.size(0);
  problem.prefix = prompt_rows ? prompt_rows : prefix_key.size(2);
  problem.is_causal = is_causal;
  problem.prefix_in_window = prefix_in_window;
  problem.window = window;
  problem.scale = scale;
  return problem;
}

// Runs f(entry, head, first key, last key) for the entries that a segment reads.
template <typename F>
void for_each_prefix(const Plan& plan, const Problem& problem, bool all, const F& f) {
  std::vector<bool> read(problem.entries, all);
  for (const Segment& segment : plan.segments)
    if (segment.entry >= 0) read[segment.entry] = true;
  const int64_t runs = (problem.prefix + kPrefixKeys - 1) / kPrefixKeys;
  torch::stable::parallel_for(0, problem.entries * problem.kv_heads * runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t entry = n / runs / problem.kv_heads, first = n % runs * kPrefixKeys;
      if (read[entry]) f(entry, n / runs % problem.kv_heads, first, std::min(first + kPrefixKeys, problem.prefix));
    }
  });
}

// Runs f(head, split, first block, last block) for all items of [begin, end), an item being a head's share of a split;
// each call's blocks are of one segment. While the heads' prefixes stay in the cache together, a segment's heads follow
// each other, since their rows are neighbours in memory; else a head's segments do.
template <typename F>
void for_each_run(const Plan& plan, const Problem& problem, int64_t prefix_bytes, int64_t begin, int64_t end,
                  const F& f) {
  const int64_t heads = problem.kv_heads, splits = plan.splits();
  const bool cached = heads * prefix_bytes <= kPrefixCacheBytes;
  for (int64_t item = begin; item < end;) {
    const int64_t split = cached ? item / heads : item % splits, head = cached ? item % heads : item / splits;
    const int64_t stop = cached ? std::min(heads, head + end - item) : head + 1;
    item += stop - head;
    const Block* last = plan.blocks.data() + plan.cuts[split + 1];
    for (const Block* run = plan.blocks.data() + plan.cuts[split]; run != last;) {
      const Block* next = run;
      while (next != last && next->segment == run->segment) ++next;
      for (int64_t h = head; h < stop; ++h) f(h, split, run, next);
      run = next;
    }
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                                   const Tensor& prefix_key_, const Tensor& prefix_value_, const Tensor& cu_seqlens_,
                                   const std::optional<Tensor>& prefix_index_, int64_t prompt_rows, bool is_causal,
                                   double scale, int64_t window, bool prefix_in_window) {
  const Tensor query = rows_contiguous(query_), key = rows_contiguous(key_), value = rows_contiguous(value_);
  const Tensor prefix_key = rows_contiguous(prefix_key_), prefix_value = rows_contiguous(prefix_value_);
  const Tensor cu_seqlens = torch::stable::contiguous(cu_seqlens_);
  std::optional<Tensor> prefix_index;
  if (prefix_index_) prefix_index = torch::stable::contiguous(*prefix_index_);
  Problem problem = problem_of(query, key, prefix_key, prompt_rows, is_causal, scale, window, prefix_in_window);
  const int64_t rows = query.size(0);
  const Plan plan = make_plan(problem, cu_seqlens, prefix_index, rows, prompt_rows);

  Tensor out = torch::stable::new_empty(query, {rows, problem.heads, problem.dim});
  const ScalarType type = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor lse = torch::stable::new_empty(query, {rows, problem.heads}, type);
  if (rows == 0) return {out, lse};
  dispatch_double_float_bfloat16(query.scalar_type(), "prefix_attention", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Kernels<T, A> kernels = choose_kernels<T>();
    Forward<T, A> call{};
    call.problem = problem;
    call.query = rows_of<T>(query);
    call.key = rows_of<T>(key);
    call.value = rows_of<T>(value);
    call.prefix_key = bank_of<T>(prefix_key, key, prompt_rows);
    call.prefix_value = bank_of<T>(prefix_value, value, prompt_rows);
    call.out = new_rows_of<T>(out);
    call.lse = lse.mutable_data_ptr<A>();
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
  return {out, lse};
}

// Room for the key and value gradients of segments that several splits share, per head.
template <typename A>
class SharedSegments {
 public:
  template <typename T>
  SharedSegments(const Plan& plan, const Problem& problem, const Kernels<T, A>& kernels)
      : splits_(plan.splits()),
        first_(splits_, -1),
        last_(splits_, -1),
        first_segment_(splits_),
        last_segment_(splits_) {
    const auto segment_at = [&](int64_t block) { return plan.blocks[block].segment; };
    const auto add = [&](int64_t segment) {
      const int64_t offset = size_;
      size_ += 2 * kernels.segment_sum_size(problem, plan.segments[segment].length);
      return offset;
    };
    const int64_t blocks = static_cast<int64_t>(plan.blocks.size());
    for (int64_t s = 0; s < splits_; ++s) {
      const int64_t begin = plan.cuts[s], end = plan.cuts[s + 1];
      if (begin == end) continue;
      const int32_t head = segment_at(begin), tail = segment_at(end - 1);
      first_segment_[s] = head;
      last_segment_[s] = tail;
      if (begin > 0 && segment_at(begin - 1) == head) {
        first_[s] = add(head);
        parts_.back().offsets.push_back(first_[s]);  // the split before it has begun this segment
      }
      const bool goes_on = end < blocks && segment_at(end) == tail;
      if (goes_on && !(first_[s] >= 0 && head == tail)) {
        last_[s] = add(tail);
        parts_.push_back({tail, {last_[s]}});
      }
    }
    memory_.reset(allocate<A>(size_ * problem.kv_heads).release());
  }

  // Where a split leaves what it finds for a segment that others share; null for one that is all its own.
  A* part(int64_t head, int64_t split, int64_t segment) const {
    if (first_[split] >= 0 && segment == first_segment_[split]) return memory_.get() + head * size_ + first_[split];
    if (last_[split] >= 0 && segment == last_segment_[split]) return memory_.get() + head * size_ + last_[split];
    return nullptr;
  }

  // Runs f(segment, pointers to its parts in order) for each shared segment.
  template <typename F>
  void for_each(int64_t head, const F& f) const {
    for (const auto& part : parts_) {
      std::vector<A*> pointers;
      for (int64_t offset : part.offsets) pointers.push_back(memory_.get() + head * size_ + offset);
      f(part.segment, pointers);
    }
  }

 private:
  struct Parts {
    int64_t segment;
    std::vector<int64_t> offsets;
  };
  int64_t splits_, size_ = 0;
  std::vector<int64_t> first_, last_, first_segment_, last_segment_;  // offsets and segments of each split's ends
  std::vector<Parts> parts_;
  Buffer<A> memory_{nullptr, &std::free};
};

Tensor gradient_like(const Tensor& tensor, bool wanted) {
  if (!wanted) return torch::stable::new_empty(tensor, {0});
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return torch::stable::new_empty(tensor, sizes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_, const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& prefix_key_,
    const Tensor& prefix_value_, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_,
    const std::optional<Tensor>& prefix_index_, int64_t prompt_rows, bool is_causal, double scale, int64_t window,
    bool prefix_in_window, bool needs_query, bool needs_key, bool needs_value, bool needs_prefix_key,
    bool needs_prefix_value) {
  const Tensor grad = rows_contiguous(grad_);
  const Tensor query = rows_contiguous(query_), key = rows_contiguous(key_), value = rows_contiguous(value_);
  const Tensor prefix_key = rows_contiguous(prefix_key_), prefix_value = rows_contiguous(prefix_value_);
  const Tensor cu_seqlens = torch::stable::contiguous(cu_seqlens_);
  std::optional<Tensor> prefix_index;
  if (prefix_index_) prefix_index = torch::stable::contiguous(*prefix_index_);
  Problem problem = problem_of(query, key, prefix_key, prompt_rows, is_causal, scale, window, prefix_in_window);
  const int64_t rows = query.size(0);
  const Plan plan = make_plan(problem, cu_seqlens, prefix_index, rows, prompt_rows);

  Tensor grad_query = gradient_like(query, needs_query), grad_key = gradient_like(key, needs_key);
  Tensor grad_value = gradient_like(value, needs_value);
  Tensor grad_prefix_key = gradient_like(prefix_key, needs_prefix_key);
  Tensor grad_prefix_value = gradient_like(prefix_value, needs_prefix_value);
  dispatch_double_float_bfloat16(query.scalar_type(), "prefix_attention", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Kernels<T, A> kernels = choose_kernels<T>();
    Backward<T, A> call{};
    call.problem = problem;
    call.query = rows_of<T>(query);
    call.key = rows_of<T>(key);
    call.value = rows_of<T>(value);
    call.out = rows_of<T>(out);
    call.grad = rows_of<T>(grad);
    call.prefix_key = bank_of<T>(prefix_key, key, prompt_rows);
    call.prefix_value = bank_of<T>(prefix_value, value, prompt_rows);
    call.lse = lse.const_data_ptr<A>();
    call.grad_query = new_rows_of<T>(grad_query);
    call.grad_key = new_rows_of<T>(grad_key);
    call.grad_value = new_rows_of<T>(grad_value);
    call.needs_query = needs_query;
    call.needs_key = needs_key;
    call.needs_value = needs_value;
    call.add_prefix = prompt_rows > 0;
    if (prompt_rows) {
      call.needs_prefix_key = needs_key;
      call.needs_prefix_value = needs_value;
      call.grad_prefix_key = {call.grad_key.data, 0, call.grad_key.head_stride, call.grad_key.row_stride};
      call.grad_prefix_value = {call.grad_value.data, 0, call.grad_value.head_stride, call.grad_value.row_stride};
    } else {
      const auto bank = [](const Tensor& t) {
        return t.dim() == 4 ? Bank<T>{t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)} : Bank<T>{};
      };
      call.needs_prefix_key = needs_prefix_key;
      call.needs_prefix_value = needs_prefix_value;
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
    if (needs_key || needs_value)
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

}  // namespace
}  // namespace fastprompt::prefix_attention

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) {
  library.impl("prefix_attention", TORCH_BOX(&fastprompt::prefix_attention::forward));
  library.impl("prefix_attention_backward", TORCH_BOX(&fastprompt::prefix_attention::backward));
}
