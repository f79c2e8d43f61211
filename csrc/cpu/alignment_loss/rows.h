// Normalisation and distance of one row, and back. Plain loops that any compiler vectorises: the products around them
// are some fifty times the work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/alignment_rows.h"
#include "../rows.h"

namespace fastprompt::alignment_loss {

// Normalises x in place and returns the factor it was multiplied by.
template <typename A>
A normalize_row(int64_t normalize, A* x, int64_t features) {
  if (normalize == kNone) return A(1);
  A sum[1];
  if (normalize == kLayer) {
    add_up(features, sum, [&](int64_t i, auto add) { add(0, x[i]); });
    const A mean = sum[0] / static_cast<A>(features);
    for (int64_t i = 0; i < features; ++i) x[i] -= mean;
  }
  add_up(features, sum, [&](int64_t i, auto add) { add(0, x[i] * x[i]); });
  const A factor = normalizing_factor(normalize, sum[0], static_cast<A>(features));
  for (int64_t i = 0; i < features; ++i) x[i] *= factor;
  return factor;
}

// The distance of normalised rows, without infonce.
template <int Distances, typename A>
A row_distance(const A* u, const A* v, int64_t features) {
  const A per_feature = A(1) / static_cast<A>(features);
  A sum[1];
  add_up(features, sum, [&](int64_t i, auto add) { add(0, distance_of(Distances, u[i], v[i], per_feature)); });
  return sum[0] + (Distances & kCosine ? A(1) : A(0));
}

// du = coefficient * distance' (+ what is there already, infonce's), then through the normalisation, in place.
template <int Distances, typename A>
void differentiate_row(int64_t normalize, A coefficient, A factor, const A* u, const A* v, bool add_to_du, A* du,
                       int64_t features) {
  const A per_feature = A(1) / static_cast<A>(features);
  if (!add_to_du) std::fill(du, du + features, A(0));
  A sums[2];
  add_up(features, sums, [&](int64_t i, auto add) {
    du[i] += coefficient * distance_gradient_of(Distances, u[i], v[i], per_feature);
    add(0, du[i]);
    add(1, u[i] * du[i]);
  });
  const ThroughNormalization<A> through(normalize, factor, sums[0], sums[1], static_cast<A>(features));
  for (int64_t i = 0; i < features; ++i) du[i] = through(u[i], du[i]);
}

}  // namespace fastprompt::alignment_loss
