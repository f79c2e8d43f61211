// Tiles in shared memory, and the operands of the tensor cores in and out of them.
#pragma once

#include "mma.h"
#include "problem.h"

namespace fastprompt::prefix_attention {

constexpr int kVector = 8;  // elements of one 16-byte access

template <typename T>
struct alignas(16) Vector {
  T lane[kVector];
};

// kRows rows of kColumns elements, each row followed by 16 bytes that nobody reads: so the rows of a matrix lie in
// different banks.
template <typename T, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStride = kColumns + kVector;
  static constexpr int kBytes = kRows * kStride * sizeof(T);
  T* data;

  __device__ T* end() const { return data + kRows * kStride; }
  __device__ T* at(int row, int column) const { return data + row * kStride + column; }

  // Begins to fill the tile: row r is `features` elements from source(r), zeros beyond and where that is null.
  template <typename Source>
  __device__ void begin_load(int features, const Source& source) const {
    constexpr int kVectors = kColumns / kVector;
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * kVector;
      const T* from = source(row);
      begin_copy(at(row, column), from + column, from != nullptr && column < features);
    }
  }

  // 16x16 elements from (row, column) on, as operand a (16 rows, 16 columns)
  __device__ void load_a(uint32_t (&a)[4], int row, int column) const {
    load_matrices(a, at(row + lane_id() % 16, column + lane_id() / 16 * 8));
  }
  // ... as operand a of their transpose
  __device__ void load_a_transposed(uint32_t (&a)[4], int row, int column) const {
    load_matrices_transposed(a, at(row + lane_id() % 8 + lane_id() / 16 * 8, column + lane_id() / 8 % 2 * 8));
  }
  // ... as operands b of two products, with the rows (of the tile) as their rows
  __device__ void load_b(uint32_t (&b)[4], int row, int column) const {
    load_matrices_transposed(b, at(row + lane_id() % 16, column + lane_id() / 16 * 8));
  }
  // ... as operands b of two products, with the rows as their columns
  __device__ void load_b_transposed(uint32_t (&b)[4], int row, int column) const {
    load_matrices(b, at(row + lane_id() % 8 + lane_id() / 16 * 8, column + lane_id() / 8 % 2 * 8));
  }
};

// Two neighbouring products: their 16 columns are c[0] and c[1].
template <typename T>
__device__ void multiply_add(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  multiply_add<T>(c0, a, b[0], b[1]);
  multiply_add<T>(c1, a, b[2], b[3]);
}

// 16 columns of results as operand a of a further product.
template <typename T>
__device__ void pack_a(uint32_t (&a)[4], const float (&c0)[4], const float (&c1)[4]) {
  a[0] = pack<T>(c0[0], c0[1]);
  a[1] = pack<T>(c0[2], c0[3]);
  a[2] = pack<T>(c1[0], c1[1]);
  a[3] = pack<T>(c1[2], c1[3]);
}

template <typename T>
__device__ void store_pair(T* to, float first, float second) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
}

}  // namespace fastprompt::prefix_attention
