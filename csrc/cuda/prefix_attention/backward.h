// Backward: a block per split of the segments and key/value head, a warp per 16 keys of a tile. Scores lie transposed,
// so that weights and their gradients are, where they were computed, the operands of the next products: five in all.
//
// No atomics: every sum is of one block in a fixed order, and the splits' sums are added up by a second kernel.
#pragma once

#include "tiles.h"

namespace fastprompt::prefix_attention {

template <typename T>
struct Backward {
  Problem problem;
  Rows<const T> grad, query, key, value, out;
  Bank<const T> prefix_key, prefix_value;
  const PeakSum* peak_sum;                     // (T, H)
  T *grad_query, *grad_key, *grad_value;       // (T, H, D), (T, Hkv, D); each null where it is not needed
  float* query_sums;                           // (T, H, D), for rows that see more than one tile of keys
  float *prefix_key_sums, *prefix_value_sums;  // (splits, N, Hkv, P, D); each null where it is not needed
};

// What shared memory holds. Larger heads take fewer rows, to keep all sums in registers.
template <typename T, int kFeatures>
struct BackwardTiles {
  static constexpr int kRows = kFeatures <= 64 ? 64 : 32;
  using KeyTile = Tile<T, kKeys, kFeatures>;
  using RowTile = Tile<T, kRows, kFeatures>;
  using ScoreTile = Tile<T, kKeys, kRows>;
  static constexpr int kBytes = 2 * KeyTile::kBytes + 2 * RowTile::kBytes + ScoreTile::kBytes +
                                kRows * (3 * sizeof(float) + sizeof(int) + sizeof(DropoutBits));
  KeyTile key{static_cast<T*>(shared_memory())}, value{key.end()};
  RowTile query{value.end()}, grad{query.end()};
  ScoreTile grad_score{grad.end()};  // transposed
  float* peak = reinterpret_cast<float*>(grad_score.end());
  float* log_sum = peak + kRows;  // in units of ln 2
  float* delta = log_sum + kRows;
  int* position = reinterpret_cast<int*>(delta + kRows);
  DropoutBits* dropout = reinterpret_cast<DropoutBits*>(position + kRows);
};

template <typename T, int kFeatures, bool kPlain>
class BackwardBlock {
 public:
  __device__ BackwardBlock(const Backward<T>& call)
      : call_(call),
        problem_(call.problem),
        features_(problem_.features),
        group_(problem_.group()),
        head_(blockIdx.y),
        needs_score_(call.grad_query || call.grad_key || call.prefix_key_sums) {}

  __device__ void run() {
    const int first = blockIdx.x;
    if (!stores(first) || first >= problem_.segments || problem_.segment(first).length == 0) {
      clear(call_.prefix_key_sums);
      clear(call_.prefix_value_sums);
    }
    for (int b = first; b < problem_.segments; b += gridDim.x) {
      segment_ = problem_.segment(b);
      if (segment_.length > 0) run_segment();
    }
  }

 private:
  using Tiles = BackwardTiles<T, kFeatures>;
  using Sums = float[kFeatures / 8][4];
  static constexpr int kRows = Tiles::kRows;

  __device__ int64_t prefix_offset(int entry) const {  // of the split's sums
    const int64_t bank = int64_t{blockIdx.x} * problem_.entries + entry;
    return (bank * problem_.kv_heads + head_) * problem_.prefix * features_;
  }

  // Whether a segment's sums of the prefix are the first of the split, and whole: to be stored, not added.
  __device__ bool stores(int segment) const {
    return segment == static_cast<int>(blockIdx.x) && problem_.entries == 1 && !problem_.prefix_in_window;
  }

  __device__ void clear(float* sums) const {
    if (sums == nullptr) return;
    for (int entry = 0; entry < problem_.entries; ++entry)
      for (int64_t i = threadIdx.x; i < int64_t{problem_.prefix} * features_; i += kThreads)
        sums[prefix_offset(entry) + i] = 0;
  }

  __device__ void run_segment() {
    const bool own = call_.grad_query || call_.grad_key || call_.grad_value;
    const bool prefix = call_.grad_query || call_.prefix_key_sums || call_.prefix_value_sums;
    const int begin = prefix ? -problem_.prefix_of(segment_) : problem_.tile_of(segment_, 0),
              end = own ? segment_.length : 0;
    for (int first = begin; first < end; first += kKeys) run_keys(first);
  }

  __device__ void run_keys(int first) {
    const int length = segment_.length, rows = length * group_;
    if (!problem_.tile_sees(0, length - 1, first)) return;  // a part of the prefix that is out of every row's window
    const Keys<T> keys(call_.key, call_.prefix_key, segment_, head_, problem_.prefix);
    const Keys<T> values(call_.value, call_.prefix_value, segment_, head_, problem_.prefix);
    __syncthreads();  // the last tile has been read, and the sums are clear
    tiles_.key.begin_load(features_, [&](int r) { return first + r < length ? keys.at(first + r) : nullptr; });
    tiles_.value.begin_load(features_, [&](int r) { return first + r < length ? values.at(first + r) : nullptr; });

    Sums grad_key = {}, grad_value = {};
    for (int first_row = 0; first_row < rows; first_row += kRows) {
      const int low = first_row / group_, high = min(rows, first_row + kRows) - 1;
      if (!problem_.tile_sees(low, high / group_, first)) continue;
      __syncthreads();  // the last rows have been read
      load_rows(first_row, rows);
      wait_for_copies();
      __syncthreads();
      if (first + 16 * warp_id() < length) add_rows(grad_key, grad_value, first);
      if (call_.grad_query == nullptr) continue;
      __syncthreads();  // the gradients of all scores are there
      add_query(first_row, rows, first, first == problem_.first_tile(segment_, low),
                first == problem_.last_tile(segment_, high / group_));
    }
    store_keys(grad_key, first, problem_.scale, call_.grad_key, call_.prefix_key_sums);
    store_keys(grad_value, first, kPlain ? 1.0f : problem_.kept_scale, call_.grad_value, call_.prefix_value_sums);
  }

  __device__ void load_rows(int first_row, int rows) const {
    const auto row_of = [&](const Rows<const T>& tensor, int r) {
      const int row = first_row + r;
      return row < rows ? tensor.at(segment_.begin + row / group_, head_ * group_ + row % group_) : nullptr;
    };
    tiles_.query.begin_load(features_, [&](int r) { return row_of(call_.query, r); });
    tiles_.grad.begin_load(features_, [&](int r) { return row_of(call_.grad, r); });
    constexpr int kLanes = kThreads / kRows;  // of a row
    const int r = threadIdx.x / kLanes, row = first_row + r;
    float delta = 0;
    if (needs_score_ && row < rows) {
      const T *out = row_of(call_.out, r), *grad = row_of(call_.grad, r);
#pragma unroll 4
      for (int d = threadIdx.x % kLanes * kVector; d < features_; d += kLanes * kVector) {
        const Vector<T> a = *reinterpret_cast<const Vector<T>*>(out + d);
        const Vector<T> b = *reinterpret_cast<const Vector<T>*>(grad + d);
#pragma unroll
        for (int i = 0; i < kVector; ++i) delta += static_cast<float>(a.lane[i]) * static_cast<float>(b.lane[i]);
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
    if (threadIdx.x % kLanes != 0) return;
    tiles_.delta[r] = delta;
    tiles_.position[r] = row / group_;
    const PeakSum of_row = row < rows ? call_.peak_sum[row_index(row)] : PeakSum{0, 1};
    tiles_.peak[r] = of_row.peak;
    tiles_.log_sum[r] = log2f(of_row.sum);
    if (!kPlain && problem_.least > 0) tiles_.dropout[r] = DropoutBits(*problem_.seed, row_index(row));
  }

  __device__ int64_t row_index(int row) const {
    return int64_t{segment_.begin + row / group_} * problem_.heads + head_ * group_ + row % group_;
  }

  // scores (16 keys, kRows) = tile (its 16 rows of the warp) rows^T
  __device__ void multiply(float (&scores)[kRows / 8][4], const typename Tiles::KeyTile& tile,
                           const typename Tiles::RowTile& rows) const {
#pragma unroll
    for (int k = 0; k < kFeatures / 16; ++k) {
      uint32_t a[4];
      tile.load_a(a, 16 * warp_id(), 16 * k);
#pragma unroll
      for (int n = 0; n < kRows / 16; ++n) {
        uint32_t b[4];
        rows.load_b_transposed(b, 16 * n, 16 * k);
        multiply_add<T>(scores[2 * n], scores[2 * n + 1], a, b);
      }
    }
  }

  // sums (16 keys, D) += scores (16 keys, kRows) rows
  __device__ void add_product(Sums& sums, const float (&scores)[kRows / 8][4],
                              const typename Tiles::RowTile& rows) const {
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
      uint32_t a[4];
      pack_a<T>(a, scores[2 * k], scores[2 * k + 1]);
#pragma unroll
      for (int d = 0; d < kFeatures / 16; ++d) {
        uint32_t b[4];
        rows.load_b(b, 16 * k, 16 * d);
        multiply_add<T>(sums[2 * d], sums[2 * d + 1], a, b);
      }
    }
  }

  // What the rows at hand give to the gradients of the warp's 16 keys; leaves the gradients of their scores behind.
  __device__ void add_rows(Sums& grad_key, Sums& grad_value, int first) const {
    const int key = 16 * warp_id() + lane_id() / 4, column = lane_id() % 4 * 2;  // of the tile; and 8 further on
    float weight[kRows / 8][4] = {};
    multiply(weight, tiles_.key, tiles_.query);
    Unplain unplain;
    if constexpr (!kPlain) problem_.cap(weight);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * n + column + i % 2;
        const bool seen = problem_.sees(tiles_.position[row], first + key + i / 2 * 8, segment_.length);
        // However the products were rounded this time, none is above the peak; NaN stays NaN.
        const float score = weight[n][i], below = score - fmaxf(score, tiles_.peak[row]);
        weight[n][i] = seen ? power_of_two(below * (problem_.unit * kLog2E) - tiles_.log_sum[row]) : 0;
        if constexpr (!kPlain) unplain.change[n][i] = weight[n][i] * problem_.slope(score);
      }
    if constexpr (!kPlain) drop(weight, unplain, first + key, column);
    if (call_.grad_value || call_.prefix_value_sums) add_product(grad_value, weight, tiles_.grad);
    if (!needs_score_) return;
    float grad_score[kRows / 8][4] = {};
    multiply(grad_score, tiles_.value, tiles_.grad);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float delta = tiles_.delta[8 * n + column + i % 2];
        if constexpr (kPlain)
          grad_score[n][i] = weight[n][i] * (grad_score[n][i] - delta);
        else
          grad_score[n][i] = unplain.grad_score(n, i, grad_score[n][i] * problem_.kept_scale, delta);
      }
      store_pair(tiles_.grad_score.at(key, 8 * n + column), grad_score[n][0], grad_score[n][1]);
      store_pair(tiles_.grad_score.at(key + 8, 8 * n + column), grad_score[n][2], grad_score[n][3]);
    }
    if (call_.grad_key || call_.prefix_key_sums) add_product(grad_key, grad_score, tiles_.query);
  }

  // What a softcap and dropout make of a weight's gradient.
  struct Unplain {
    float change[kRows / 8][4];  // the weight that is not dropped yet, times the slope of its score
    uint32_t dropped = 0;        // a bit for each
    __device__ float grad_score(int n, int i, float grad, float delta) const {
      return change[n][i] * ((dropped >> (4 * n + i) & 1 ? 0 : grad) - delta);
    }
  };

  // Dropout of weights, of the keys from `key` on; what is kept is not scaled yet.
  __device__ void drop(float (&weight)[kRows / 8][4], Unplain& unplain, int key, int column) const {
    static_assert(kRows / 8 * 4 <= 32);
    if (problem_.least == 0) return;
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (problem_.keeps(tiles_.dropout[8 * n + column + i % 2], key + i / 2 * 8)) continue;
        weight[n][i] = 0;
        unplain.dropped |= 1u << (4 * n + i);
      }
  }

  // What the keys at hand give to the gradient of the query rows at hand. A warp takes 16 rows, and a part of the
  // features where there are more warps than that.
  __device__ void add_query(int first_row, int rows, int first, bool is_first, bool is_last) const {
    constexpr int kRowTiles = kRows / 16, kPart = kFeatures * kRowTiles / kWarps;
    const int row = warp_id() % kRowTiles * 16, feature = warp_id() / kRowTiles * kPart;
    float sums[kPart / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      if (first + 16 * k >= segment_.length) break;
      uint32_t a[4];
      tiles_.grad_score.load_a_transposed(a, 16 * k, row);
#pragma unroll
      for (int d = 0; d < kPart / 16; ++d) {
        uint32_t b[4];
        tiles_.key.load_b(b, 16 * k, feature + 16 * d);
        multiply_add<T>(sums[2 * d], sums[2 * d + 1], a, b);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = first_row + row + lane_id() / 4 + 8 * h;
      if (r >= rows) continue;
      const int64_t offset = row_index(r) * features_ + feature + lane_id() % 4 * 2;
#pragma unroll
      for (int d = 0; d < kPart / 8; ++d) {
        if (feature + 8 * d >= features_) break;
        float2 sum{sums[d][2 * h], sums[d][2 * h + 1]};
        if (!is_first) {
          const float2 before = *reinterpret_cast<const float2*>(call_.query_sums + offset + 8 * d);
          sum = {sum.x + before.x, sum.y + before.y};
        }
        if (is_last)
          store_pair(call_.grad_query + offset + 8 * d, sum.x * problem_.scale, sum.y * problem_.scale);
        else
          *reinterpret_cast<float2*>(call_.query_sums + offset + 8 * d) = sum;
      }
    }
  }

  // The sums of the warp's 16 keys: of the segment's to `grad`, of the prefix's onto what earlier segments gave. A
  // prompt's own keys are the prefix of the segments that follow.
  __device__ void store_keys(const Sums& sums, int first, float scale, T* grad, float* prefix_sums) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first + 16 * warp_id() + lane_id() / 4 + 8 * h, column = lane_id() % 4 * 2;
      if (key >= segment_.length) continue;
      if (key < 0 || problem_.is_prompt(segment_)) {
        if (prefix_sums == nullptr) continue;
        float* to =
            prefix_sums + prefix_offset(segment_.entry) + (key + problem_.prefix_of(segment_)) * features_ + column;
        const bool whole = stores(segment_.index);
#pragma unroll
        for (int d = 0; d < kFeatures / 8; ++d) {
          if (8 * d >= features_) break;
          float2& total = *reinterpret_cast<float2*>(to + 8 * d);
          const float2 before = whole ? float2{0, 0} : total;
          total = {before.x + sums[d][2 * h] * scale, before.y + sums[d][2 * h + 1] * scale};
        }
      } else if (grad != nullptr) {
        T* to = grad + ((int64_t{segment_.begin + key} * problem_.kv_heads + head_) * features_ + column);
#pragma unroll
        for (int d = 0; d < kFeatures / 8; ++d) {
          if (8 * d >= features_) break;
          store_pair(to + 8 * d, sums[d][2 * h] * scale, sums[d][2 * h + 1] * scale);
        }
      }
    }
  }

  const Backward<T>& call_;
  const Problem& problem_;
  const int features_, group_, head_;
  const bool needs_score_;
  const Tiles tiles_;
  Segment segment_;
};

// Grid: (splits, Hkv). kPlain: neither softcap nor dropout.
template <typename T, int kFeatures, bool kPlain>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward<T> call) {
  BackwardBlock<T, kFeatures, kPlain>(call).run();
}

// grad = the sums over the splits, in their order. Grid: (blocks of count, 2): the keys' and the values'.
template <typename T>
__global__ void sum_splits(const Problem problem, const float* key_sums, const float* value_sums, Bank<T> grad_key,
                           Bank<T> grad_value, int splits, int64_t count) {
  const float* sums = blockIdx.y == 0 ? key_sums : value_sums;
  const Bank<T> grad = blockIdx.y == 0 ? grad_key : grad_value;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (grad.data == nullptr || i >= count) return;
  float total = 0;
  for (int split = 0; split < splits; ++split) total += sums[split * count + i];
  const int64_t row = i / problem.features, head = row / problem.prefix;
  T* to = grad.at(head / problem.kv_heads, head % problem.kv_heads) + row % problem.prefix * grad.row_stride;
  to[i % problem.features] = static_cast<T>(total);
}

}  // namespace fastprompt::prefix_attention
