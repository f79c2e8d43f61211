// The mathematics of one row of alignment_loss, feature by feature.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

namespace fastprompt::alignment_loss {

// The numbers that the operator's integer arguments mean.
enum Normalize { kL2, kLayer, kNone };
enum Distance { kCosine = 1, kMse = 2, kSmoothL1 = 4, kInfonce = 8 };  // those that are added up
enum Reduction { kRows, kSum, kMean };

// What a row, under kLayer less its mean, is multiplied by; 0 where it counts as zero.
template <typename A>
C10_HOST_DEVICE A normalizing_factor(int64_t normalize, A sum_of_squares, A features) {
  if (normalize == kNone) return A(1);
  const A square = normalize == kLayer ? sum_of_squares / features : sum_of_squares;
  const A eps = normalize == kLayer ? A(1e-5) : A(1e-12);
  return square <= eps * eps ? A(0) : A(1) / std::sqrt(square);
}

// One feature's part in the row's distance; kCosine is 1 plus its parts.
template <typename A>
C10_HOST_DEVICE A distance_of(int distances, A u, A v, A per_feature) {
  const A gap = u - v, size = gap < A(0) ? -gap : gap;
  A sum = 0;
  if (distances & kCosine) sum -= u * v;
  if (distances & kMse) sum += gap * gap * per_feature;
  if (distances & kSmoothL1) sum += (size < A(1) ? gap * gap * A(0.5) : size - A(0.5)) * per_feature;
  return sum;
}

// Its derivative by u. All distances are symmetric: with u and v exchanged it is the derivative by v.
template <typename A>
C10_HOST_DEVICE A distance_gradient_of(int distances, A u, A v, A per_feature) {
  const A gap = u - v, no_more = gap > A(1) ? A(1) : gap;
  A sum = 0;
  if (distances & kCosine) sum -= v;
  if (distances & kMse) sum += 2 * gap * per_feature;
  if (distances & kSmoothL1) sum += (no_more < A(-1) ? A(-1) : no_more) * per_feature;
  return sum;
}

// With du the gradient of the normalised row u, that of the row itself is factor * (du - shift - u * along).
template <typename A>
struct ThroughNormalization {
  A factor, shift, along;

  C10_HOST_DEVICE ThroughNormalization(int64_t normalize, A factor_, A sum_du, A sum_u_du, A features)
      : factor(factor_),
        shift(normalize == kLayer ? sum_du / features : A(0)),
        along(normalize == kL2 ? sum_u_du : (normalize == kLayer ? sum_u_du / features : A(0))) {}

  C10_HOST_DEVICE A operator()(A u, A du) const { return factor * (du - shift - u * along); }
};

}  // namespace fastprompt::alignment_loss
