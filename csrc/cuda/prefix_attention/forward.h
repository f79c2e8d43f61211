// Forward: a block per tile of rows and key/value head, a warp per 16 rows, softmax as the keys go by.
#pragma once

#include "tiles.h"

namespace fastprompt::prefix_attention {

constexpr int kForwardRows = 16 * kWarps;

template <typename T>
struct Forward {
  Problem problem;
  Rows<const T> query, key, value;
  Bank<const T> prefix_key, prefix_value;
  Rows<T> out;
  float* lse;         // (T, H)
  PeakSum* peak_sum;  // (T, H)
};

template <typename T, int kFeatures>
using KeyTile = Tile<T, kKeys, kFeatures>;

template <typename T, int kFeatures>
constexpr int kForwardBytes = 2 * KeyTile<T, kFeatures>::kBytes;

// Dropout of the weights of a lane's two rows, the first with key `first`; what is kept is not scaled yet.
__device__ inline void drop(const Problem& problem, const DropoutBits (&rows)[2], int first,
                            float (&weight)[kKeys / 8][4]) {
  if (problem.least == 0) return;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!problem.keeps(rows[i / 2], first + 8 * n + i % 2)) weight[n][i] = 0;
}

// Grid: (slots, Hkv), see Problem::find_tile. kPlain: neither softcap nor dropout.
template <typename T, int kFeatures, bool kPlain>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward<T> call) {
  const Problem& problem = call.problem;
  const int features = problem.features, group = problem.group(), kv_head = blockIdx.y;
  int first_row;
  const Segment segment = problem.find_tile(blockIdx.x, kForwardRows, first_row);
  const int begin = segment.begin, length = segment.length, rows = length * group;
  if (first_row >= rows) return;
  const Keys<T> keys(call.key, call.prefix_key, segment, kv_head, problem.prefix);
  const Keys<T> values(call.value, call.prefix_value, segment, kv_head, problem.prefix);
  const KeyTile<T, kFeatures> key_tile{static_cast<T*>(shared_memory())};
  const KeyTile<T, kFeatures> value_tile{key_tile.end()};

  // A lane holds two rows of its warp's 16, and of each two neighbouring columns of every 8.
  const int warp_row = first_row + 16 * warp_id(), column = lane_id() % 4 * 2;
  int position[2], head[2];
  bool valid[2];
  const T* source[2];
  DropoutBits dropout[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp_row + lane_id() / 4 + 8 * h;
    valid[h] = row < rows;
    position[h] = row / group;
    head[h] = kv_head * group + row % group;
    source[h] = valid[h] ? call.query.at(begin + position[h], head[h]) + column : nullptr;
    if (!kPlain && problem.least > 0)
      dropout[h] = DropoutBits(*problem.seed, int64_t{begin + position[h]} * problem.heads + head[h]);
  }
  uint32_t query[kFeatures / 16][4];
#pragma unroll
  for (int k = 0; k < kFeatures / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = source[i % 2];
      const bool there = from != nullptr && 16 * k < features;
      query[k][i] = there ? *reinterpret_cast<const uint32_t*>(from + 16 * k + i / 2 * 8) : 0;
    }

  const float scale = problem.unit * kLog2E;
  float peak[2] = {kLowest, kLowest}, total[2] = {0, 0};  // finite: a tile may hide all its keys from a row
  float out[kFeatures / 8][4] = {};
  const int low = first_row / group, high = min(rows - 1, first_row + kForwardRows - 1) / group;
  const int last_tile = problem.last_tile(segment, high);
  for (int first = problem.first_tile(segment, low); first <= last_tile; first += kKeys) {
    if (!problem.tile_sees(low, high, first)) continue;
    __syncthreads();  // the last tile has been read
    key_tile.begin_load(features, [&](int r) { return first + r < length ? keys.at(first + r) : nullptr; });
    value_tile.begin_load(features, [&](int r) { return first + r < length ? values.at(first + r) : nullptr; });
    wait_for_copies();
    __syncthreads();
    if (warp_row >= rows) continue;

    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      if (first + 16 * n >= length) break;
#pragma unroll
      for (int k = 0; k < kFeatures / 16; ++k) {
        uint32_t b[4];
        key_tile.load_b_transposed(b, 16 * n, 16 * k);
        multiply_add<T>(score[2 * n], score[2 * n + 1], query[k], b);
      }
    }
    if constexpr (!kPlain) problem.cap(score);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = peak[h];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          const bool seen = problem.sees(position[h], first + 8 * n + column + i % 2, length);
          score[n][i] = seen ? score[n][i] : -INFINITY;
          highest = fmaxf(highest, score[n][i]);
        }
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      // Differences first: a score times the scale is rounded to its own size.
      const float shrink = power_of_two((peak[h] - highest) * scale);
      peak[h] = highest;
      total[h] *= shrink;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          score[n][i] = power_of_two((score[n][i] - highest) * scale);
          total[h] += score[n][i];
        }
#pragma unroll
      for (int d = 0; d < kFeatures / 8; ++d) {
        out[d][2 * h] *= shrink;
        out[d][2 * h + 1] *= shrink;
      }
    }
    if constexpr (!kPlain) drop(problem, dropout, first + column, score);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      if (first + 16 * n >= length) break;
      uint32_t weight[4];
      pack_a<T>(weight, score[2 * n], score[2 * n + 1]);
#pragma unroll
      for (int d = 0; d < kFeatures / 16; ++d) {
        uint32_t b[4];
        value_tile.load_b(b, 16 * n, 16 * d);
        multiply_add<T>(out[2 * d], out[2 * d + 1], weight, b);
      }
    }
  }

  if (warp_row >= rows) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(~0u, total[h], 1);
    total[h] += __shfl_xor_sync(~0u, total[h], 2);
    if (!valid[h]) continue;
    const int64_t row = begin + position[h];
    const float divisor = kPlain ? total[h] : total[h] / problem.kept_scale;
    T* to = call.out.at(row, head[h]) + column;
#pragma unroll
    for (int d = 0; d < kFeatures / 8; ++d)
      if (8 * d < features) store_pair(to + 8 * d, out[d][2 * h] / divisor, out[d][2 * h + 1] / divisor);
    if (column == 0) {
      call.lse[row * problem.heads + head[h]] = peak[h] * problem.unit + log2f(total[h]) * kLn2;
      call.peak_sum[row * problem.heads + head[h]] = {peak[h], total[h]};
    }
  }
}

}  // namespace fastprompt::prefix_attention
