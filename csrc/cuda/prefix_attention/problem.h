// What a call of prefix_attention is about: where tensors lie, and which rows see which keys.
//
// The query heads of a group stand side by side: "row" r of a segment is its position r / group under head r % group of
// the group. The keys of a segment and its prefix are counted through: the prefix at positions -P..-1, the segment from
// 0. Where the first rows are a prompt, they are segment 0, which has no prefix, and the prefix of all that follow.
#pragma once

#include <cassert>
#include <cstdint>

#include "../../common/packed_rows.h"

namespace fastprompt::prefix_attention {

#include "../../common/dropout.h"

constexpr int kWarps = 4, kWarpSize = 32, kThreads = kWarps * kWarpSize;
constexpr int kKeys = 64;                                                  // of a tile
constexpr int kFar = 1000000000;                                           // further than any segment is long
constexpr float kLowest = -3.4028234e38f;                                  // a score below all others, and finite
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;  // the hardware's exponential is exp2

__device__ inline int lane_id() { return threadIdx.x % kWarpSize; }
__device__ inline int warp_id() { return threadIdx.x / kWarpSize; }

// (rows, heads, D), features contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride, head_stride;
  __device__ T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// (N, Hkv, P, D), features contiguous.
template <typename T>
struct Bank {
  T* data;
  int64_t entry_stride, head_stride, row_stride;
  __device__ T* at(int64_t entry, int64_t head) const { return data + entry * entry_stride + head * head_stride; }
};

// What the backward needs of a row's scores to find the very weights of the forward: their log-sum-exp alone is rounded
// to the size of the scores.
struct alignas(8) PeakSum {
  float peak, sum;  // the greatest product of query and key, and the sum of e^(score - greatest)
};

struct Segment {
  int index, begin, length, entry;
};

// The keys, or values, of one segment, its prefix (which nobody asks a prompt for) and one head, by position.
template <typename T>
struct Keys {
  const T *segment, *after_prefix;
  int64_t segment_stride, prefix_stride;
  __device__ Keys(const Rows<const T>& rows, const Bank<const T>& bank, const Segment& own, int head, int prefix)
      : segment(rows.at(own.begin, head)),
        after_prefix(bank.at(own.entry, head) + prefix * bank.row_stride),
        segment_stride(rows.row_stride),
        prefix_stride(bank.row_stride) {}
  __device__ const T* at(int position) const {
    return position < 0 ? after_prefix + position * prefix_stride : segment + position * segment_stride;
  }
};

struct Problem {
  const int32_t* cu_seqlens;  // with a prompt counted from behind it
  Integers prefix_index;      // without data: all read entry 0
  const int64_t* seed;        // of dropout; null without
  int segments, heads, kv_heads, features, entries, prefix;
  int back, ahead;  // how far behind and ahead of its own position a row sees
  bool prefix_in_window, has_prompt;
  float scale;            // positive
  float inverse_softcap;  // 0: none
  float unit;             // of scores as the kernels compare them: the softcap, or without one the scale of products
  int32_t least;          // see least_kept; 0: no dropout
  float kept_scale;       // of the weights that dropout keeps

  __device__ int group() const { return heads / kv_heads; }

  __device__ int begin(int index) const {
    if (!has_prompt) return cu_seqlens[index];
    return index == 0 ? 0 : cu_seqlens[index - 1] + prefix;
  }

  __device__ Segment segment(int index) const {
    const int first = begin(index);
    const int64_t entry = prefix_index.data ? prefix_index[index] : 0;
    assert(entry >= 0 && entry < entries && "prefix_index out of range");
    return {index, first, begin(index + 1) - first, static_cast<int>(entry)};
  }
  __device__ bool is_prompt(const Segment& own) const { return has_prompt && own.index == 0; }
  // Of the keys before a segment's own. Not kept with the segment: the backward has no register left for it.
  __device__ int prefix_of(const Segment& own) const { return is_prompt(own) ? 0 : prefix; }

  // The first row of the tile of `tile_rows` rows that a block works on; beyond the segment's last if the slot is one
  // too many. Segment b owns the slots from its begin * group() / tile_rows + b on, at least as many as it has tiles:
  // so the grid follows from shapes alone.
  __device__ Segment find_tile(int slot, int tile_rows, int& first_row) const {
    const auto first_slot = [&](int b) { return static_cast<int>(int64_t{begin(b)} * group() / tile_rows) + b; };
    int before = 0;
    for (int b = lane_id(); b < segments; b += kWarpSize) before += first_slot(b) <= slot;
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) before += __shfl_xor_sync(~0u, before, lanes);
    const Segment found = segment(before - 1);
    first_row = (slot - first_slot(found.index)) * tile_rows;
    return found;
  }

  __device__ bool sees(int position, int key, int length) const {
    return key <= position + ahead && key < length && (key >= position - back || (key < 0 && !prefix_in_window));
  }
  // Whether some row at positions low..high may see some key of the tile that begins at `first`.
  __device__ bool tile_sees(int low, int high, int first) const {
    return first <= high + ahead && (first + kKeys > low - back || (first < 0 && !prefix_in_window));
  }
  // The tiles of `own`, by their first key, that hold the first key that `low` sees, and the last that `high` sees.
  __device__ int first_tile(const Segment& own, int low) const {
    const int before = prefix_of(own), key = low - back;
    return key <= -before || (before > 0 && !prefix_in_window) ? -before : tile_of(own, key);
  }
  __device__ int last_tile(const Segment& own, int high) const {
    return tile_of(own, high + ahead < own.length ? high + ahead : own.length - 1);
  }
  __device__ int tile_of(const Segment& own, int key) const {
    return (key + prefix_of(own)) / kKeys * kKeys - prefix_of(own);
  }

  // Products of queries and keys become scores: under a softcap tanh(scale * product / softcap).
  template <int kCount>
  __device__ void cap(float (&product)[kCount][4]) const {
    if (inverse_softcap == 0) return;
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)  // in this order nothing but infinity comes of numbers at the edges of the range
        product[n][i] = tanhf(product[n][i] * scale * inverse_softcap);
  }
  // The derivative of a score in its unit, by the product, but for `scale`.
  __device__ float slope(float score) const { return inverse_softcap == 0 ? 1 : 1 - score * score; }

  __device__ bool keeps(const DropoutBits& row, int key) const {
    return static_cast<int32_t>(row.of(static_cast<uint32_t>(prefix + key))) >= least;
  }
};

}  // namespace fastprompt::prefix_attention
