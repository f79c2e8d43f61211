// Interface between the operator and the code for one instruction set.
#pragma once

#include "problem.h"

namespace fastprompt::prefix_attention {

// Everything a forward needs. A is what T is computed in.
template <typename T, typename A>
struct Forward {
  Problem problem;
  Rows<const T> query, key, value;
  Bank<const T> prefix_key, prefix_value;
  RelativeBias<A> bias;
  A* packed_prefix;  // filled by pack_prefix
  Rows<T> out;
  A* lse;                // (rows, H)
  PeakSum<A>* peak_sum;  // (rows, H)
};

template <typename T, typename A>
struct Backward {
  Problem problem;
  Rows<const T> query, key, value, out, grad;
  Bank<const T> prefix_key, prefix_value;
  RelativeBias<A> bias;
  A* packed_prefix;
  const PeakSum<A>* peak_sum;
  Rows<T> grad_query, grad_key, grad_value;  // of the segments' own rows
  Bank<T> grad_prefix_key, grad_prefix_value;
  bool needs_query, needs_key, needs_value, needs_prefix_key, needs_prefix_value;
  bool add_prefix;  // the prefix's gradient goes on top of what is there: its rows are also a segment's own
  int64_t splits;
  A* prefix_sums;  // (splits, entries, Hkv, 2, elements of a packed prefix), zero at the start
};

// One instruction set's functions. Sizes are in elements of A.
template <typename T, typename A>
struct Kernels {
  int64_t (*packed_prefix_size)(const Problem&, bool backward);  // of one entry and head
  int64_t (*prefix_sum_size)(const Problem&);                    // of one entry and head, key or value
  int64_t (*segment_sum_size)(const Problem&, int64_t length);   // key or value
  int64_t (*scratch_size)(const Problem&, int64_t longest, bool backward);
  // Keys [first, last) of the prefix; first is a multiple of kPrefixKeys.
  void (*pack_prefix_forward)(const Forward<T, A>&, int64_t entry, int64_t head, int64_t first, int64_t last);
  void (*pack_prefix_backward)(const Backward<T, A>&, int64_t entry, int64_t head, int64_t first, int64_t last);
  // The blocks [first, last) are of one segment.
  void (*forward)(const Forward<T, A>&, int64_t head, const Block* first, const Block* last, A* scratch);
  void (*backward)(const Backward<T, A>&, int64_t head, int64_t split, const Block* first, const Block* last, A* part,
                   A* scratch);  // part: room for the segment's key and value gradients where others share it, or null

  // Adds up what the splits found for keys [first, last) of one entry and head, in their order.
  void (*finish_prefix)(const Backward<T, A>&, int64_t entry, int64_t head, int64_t first, int64_t last);
  // Adds up what `count` items found for one segment and head, in their order.
  void (*finish_segment)(const Backward<T, A>&, int64_t segment, int64_t head, A* const* parts, int64_t count);
};

}  // namespace fastprompt::prefix_attention
