// Division of a call's work: segments into blocks of rows, blocks into splits for the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "../checks.h"
#include "kernel.h"

namespace fastprompt::prefix_attention {

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
  int64_t longest = 0;        // of the segments' keys

  int64_t splits() const { return static_cast<int64_t>(cuts.size()) - 1; }
};

// Bounds of the segments, and how many rows they divide.
struct Bounds {
  torch::stable::Tensor query;
  int64_t rows;
  std::optional<torch::stable::Tensor> key;  // where they differ
  int64_t key_rows;
};

inline void add_segments(Plan& plan, const Bounds& all, const std::optional<torch::stable::Tensor>& prefix_index,
                         int64_t entries, int64_t prompt_rows) {
  const int32_t* bounds = all.query.const_data_ptr<int32_t>();
  const int32_t* key_bounds = all.key ? all.key->const_data_ptr<int32_t>() : bounds;
  const int64_t count = all.query.size(0) - 1;
  check_segments(bounds, count, all.rows - prompt_rows);
  if (all.key) check_segments(key_bounds, count, all.key_rows, "cu_seqlens_k");
  if (prefix_index) check_range(Integers(*prefix_index), count, entries, "prefix_index");
  if (prompt_rows) plan.segments.push_back({0, prompt_rows, 0, prompt_rows, -1});
  for (int64_t b = 0; b < count; ++b) {
    const int64_t entry = prefix_index ? Integers(*prefix_index)[b] : 0;
    plan.segments.push_back({prompt_rows + bounds[b], bounds[b + 1] - bounds[b], prompt_rows + key_bounds[b],
                             key_bounds[b + 1] - key_bounds[b], entry});
  }
}

inline Plan make_plan(Problem& problem, const Bounds& bounds, const std::optional<torch::stable::Tensor>& prefix_index,
                      int64_t prompt_rows) {
  Plan plan;
  add_segments(plan, bounds, prefix_index, problem.entries, prompt_rows);
  problem.segments = plan.segments.data();
  // Blocks as large as leaves each thread two of them.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = bounds.rows * problem.heads / (2 * threads);
  const int64_t block_rows = std::clamp((share + kTileRows - 1) / kTileRows * kTileRows, kBlockRows / 4, kBlockRows);
  std::vector<int64_t> cost{0};  // of the blocks so far, in rows times keys
  for (size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    plan.longest = std::max(plan.longest, segment.key_length);
    const int64_t group_rows = segment.length * problem.group();
    const int64_t count = (group_rows + block_rows - 1) / block_rows;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t first = group_rows * n / count, last = group_rows * (n + 1) / count;
      plan.blocks.push_back({static_cast<int32_t>(s), static_cast<int32_t>(first), static_cast<int32_t>(last)});
      const Problem::Range keys = problem.segment_keys((first + last) / 2 / problem.group(), segment.key_length);
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
      size_ += 2 * kernels.segment_sum_size(problem, plan.segments[segment].key_length);
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

}  // namespace fastprompt::prefix_attention
