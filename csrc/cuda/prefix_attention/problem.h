// What a call of prefix_attention is about: where tensors lie, and which rows see which keys.
//
// The query heads of a group stand side by side: "row" r of a segment is its position r / group under head r % group of
// the group. The keys of a segment and its prefix are counted through: the prefix at positions -P..-1, the segment from
// 0.
#pragma once

#include <cassert>
#include <cstdint>

#include "../../common/packed_rows.h"

namespace fastprompt::prefix_attention {

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

// The keys, or values, of one segment, its prefix and one head, by position.
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
  const int32_t* cu_seqlens;
  Integers prefix_index;  // without data: all read entry 0
  int segments, heads, kv_heads, features, entries, prefix;
  int back, ahead;  // how far behind and ahead of its own position a row sees
  bool prefix_in_window;
  float scale;  // positive

  __device__ int group() const { return heads / kv_heads; }

  __device__ Segment segment(int index) const {
    const int begin = cu_seqlens[index];
    const int64_t entry = prefix_index.data ? prefix_index[index] : 0;
    assert(entry >= 0 && entry < entries && "prefix_index out of range");
    return {index, begin, cu_seqlens[index + 1] - begin, static_cast<int>(entry)};
  }

  // The first row of the tile of `tile_rows` rows that a block works on; beyond the segment's last if the slot is one
  // too many. Segment b owns the slots from cu_seqlens[b] * group / tile_rows + b on, at least as many as it has tiles:
  // so the grid follows from shapes alone.
  __device__ Segment find_tile(int slot, int tile_rows, int& first_row) const {
    const auto first_slot = [&](int b) { return static_cast<int>(int64_t{cu_seqlens[b]} * group() / tile_rows) + b; };
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
  // The tiles, by their first key, that hold the first key that `low` sees, and the last that `high` sees.
  __device__ int first_tile(int low) const {
    if (!prefix_in_window && prefix > 0) return -prefix;
    const int key = low - back;
    return key <= -prefix ? -prefix : tile_of(key);
  }
  __device__ int last_tile(int high, int length) const {
    return tile_of(high + ahead < length ? high + ahead : length - 1);
  }
  __device__ int tile_of(int key) const { return (key + prefix) / kKeys * kKeys - prefix; }
};

}  // namespace fastprompt::prefix_attention
