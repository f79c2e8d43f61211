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

// 1 over the norm of a row; 0 where it counts as zero.
template <typename A>
C10_HOST_DEVICE A inverse_norm(A sum_of_squares) {
  const A eps = A(1e-12);
  return sum_of_squares <= eps * eps ? A(0) : A(1) / std::sqrt(sum_of_squares);
}

// What a row, under kLayer less its mean, is multiplied by: `factor` normalises it, and then `to_unit` brings it to the
// unit norm that kCosine compares.
template <typename A>
struct RowScale {
  A factor = 1, to_unit = 1;

  RowScale() = default;
  C10_HOST_DEVICE RowScale(int64_t normalize, A sum_of_squares, A features) {
    if (normalize == kL2) {
      factor = inverse_norm(sum_of_squares);
      return;
    }
    if (normalize == kLayer) factor = A(1) / std::sqrt(sum_of_squares / features + A(1e-5));
    to_unit = inverse_norm(sum_of_squares * factor * factor);
  }
};

// One feature's part in the row's distance, but for kCosine: that is 1 - the sum of u * v * both rows' to_unit.
template <typename A>
C10_HOST_DEVICE A distance_of(int distances, A u, A v, A per_feature) {
  const A gap = u - v, size = gap < A(0) ? -gap : gap;
  A sum = 0;
  if (distances & kMse) sum += gap * gap * per_feature;
  if (distances & kSmoothL1) sum += (size < A(1) ? gap * gap * A(0.5) : size - A(0.5)) * per_feature;
  return sum;
}

// The derivative of the distance by u, but for kCosine's part along u itself; to_unit is the product of both rows'. All
// distances are symmetric: with u and v exchanged it is the derivative by v.
template <typename A>
C10_HOST_DEVICE A distance_gradient_of(int distances, A u, A v, A per_feature, A to_unit) {
  const A gap = u - v, no_more = gap > A(1) ? A(1) : gap;
  A sum = 0;
  if (distances & kCosine) sum -= to_unit * v;
  if (distances & kMse) sum += 2 * gap * per_feature;
  if (distances & kSmoothL1) sum += (no_more < A(-1) ? A(-1) : no_more) * per_feature;
  return sum;
}

// With du the gradient of the normalised row u, that of the row itself is factor * (du - shift - u * along). What du
// lacks of kCosine is u * cosine * to_unit^2, with `cosine` that of the rows times what the distance is multiplied by;
// kL2 takes what is along u out again.
template <typename A>
struct ThroughNormalization {
  A factor, shift, along;

  C10_HOST_DEVICE ThroughNormalization(int64_t normalize, const RowScale<A>& scale, A sum_du, A sum_u_du, A cosine,
                                       A features)
      : factor(scale.factor), shift(normalize == kLayer ? sum_du / features : A(0)), along(sum_u_du) {
    if (normalize == kL2) return;
    along = (normalize == kLayer ? (sum_u_du + cosine) / features : A(0)) - cosine * scale.to_unit * scale.to_unit;
  }

  C10_HOST_DEVICE A operator()(A u, A du) const { return factor * (du - shift - u * along); }
};

}  // namespace fastprompt::alignment_loss
