// What a call of prefix_attention is about: shapes, visibility, and the division of its rows into blocks. Plain data,
// the same for every instruction set.
#pragma once

#include <cstdint>

namespace fastprompt::prefix_attention {

constexpr int64_t kBlockRows = 96;    // rows (query rows times heads of a group) that a block holds at most
constexpr int64_t kPrefixKeys = 128;  // of a long prefix, packed and summed as one item of work
constexpr int64_t kPrefixCacheBytes = 512 * 1024;  // what the prefixes of all heads may take to stay cached
constexpr int64_t kTileRows = 6;                   // rows of a register tile
constexpr int64_t kChunkElements = 16384;          // of a chunk of keys: 64 KB in float32, several of which stay in L2

constexpr int64_t kBiasPad = 16;  // columns by which a table of biases goes on at both ends: a vector

struct Segment {
  int64_t begin, length;          // rows of the query
  int64_t key_begin, key_length;  // rows of key and value: the same, but in cross-attention
  int64_t entry;                  // of the prefix bank; -1: it reads none
};

// Query rows of a segment for one key/value head, i-major: row r is position r / group, head r % group of the group.
struct Block {
  int32_t segment;
  int32_t first, last;  // rows
};

// What the backward needs of a row's scores to find the very weights of the forward: their log-sum-exp alone is rounded
// to the size of the scores.
template <typename A>
struct PeakSum {
  A peak, sum;  // the greatest score in Problem::unit(), and the sum of e^(score - greatest)
};

struct Problem {
  const Segment* segments;
  int64_t heads, kv_heads, dim, entries, prefix;  // H, Hkv, D, N, P
  bool is_causal, prefix_in_window;
  int64_t window;  // as transformers counts, of any size; -1: none
  double scale;    // positive
  double softcap;  // 0: none
  double dropout_p;
  uint64_t seed;

  int64_t group() const { return heads / kv_heads; }
  double unit() const { return softcap > 0 ? softcap : scale; }  // of scores as kernels compare them

  struct Range {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
  };

  // The keys of its own segment, and of the prefix, that position i attends to.
  Range segment_keys(int64_t i, int64_t length) const {
    int64_t begin = 0, end = is_causal ? i + 1 : length;
    if (window >= 0) {
      const int64_t reach = is_causal ? window - 1 : window;
      if (i - reach > begin) begin = i - reach;
      if (!is_causal && reach < end - i - 1) end = i + reach + 1;
    }
    return {begin, end};
  }
  Range prefix_keys(int64_t i) const {  // key p stands at position p - P
    int64_t begin = 0;
    if (window >= 0 && prefix_in_window) {
      const int64_t reach = is_causal ? window - 1 : window;
      if (i - reach + prefix > 0) begin = i - reach + prefix;
    }
    return {begin < prefix ? begin : prefix, prefix};
  }
};

// What is added to a product by the distance from query to key: the biases of scores, divided by Problem::scale. A
// (heads, columns) table, each row with its first and last value kBiasPad times more before and after it.
template <typename A>
struct RelativeBias {
  const A* table;   // null: none
  int64_t columns;  // odd, distance 0 in the middle
};

// A (rows, heads, D) tensor whose features are contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride, head_stride;
  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// A bank of prefixes, (N, Hkv, P, D), whose features are contiguous.
template <typename T>
struct Bank {
  T* data;
  int64_t entry_stride, head_stride, row_stride;
  T* at(int64_t entry, int64_t head) const { return data + entry * entry_stride + head * head_stride; }
};

}  // namespace fastprompt::prefix_attention
