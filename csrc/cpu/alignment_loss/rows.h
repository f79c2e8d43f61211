// Normalisation and distance of one row, and back. Plain loops that any compiler vectorises: the products around them
// are some fifty times the work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/alignment_rows.h"
#include "../rows.h"

namespace fastprompt::alignment_loss {

// Normalises x in place.
template <int Distances, typename A>
RowScale<A> normalize_row(int64_t normalize, A* x, int64_t features) {
  if (normalize == kNone && !(Distances & kCosine)) return {};
  A sum[1];
  if (normalize == kLayer) {
    const A first = x[0];  // less that, a row of equal features is exactly zero
    add_up(features, sum, [&](int64_t i, auto add) { add(0, x[i] - first); });
    const A mean = first + sum[0] / static_cast<A>(features);
    for (int64_t i = 0; i < features; ++i) x[i] -= mean;
  }
  add_up(features, sum, [&](int64_t i, auto add) { add(0, x[i] * x[i]); });
  const RowScale<A> scale(normalize, sum[0], static_cast<A>(features));
  if (normalize != kNone)
    for (int64_t i = 0; i < features; ++i) x[i] *= scale.factor;
  return scale;
}

template <typename A>
struct Comparison {
  RowScale<A> u, v;
  A cosine;
};

// The distance of normalised rows, without infonce; and their cosine, if it is part of that.
template <int Distances, typename A>
A compare_rows(const A* u, const A* v, int64_t features, Comparison<A>& rows) {
  const A per_feature = A(1) / static_cast<A>(features);
  A sums[2];
  add_up(features, sums, [&](int64_t i, auto add) {
    if constexpr (Distances & kCosine) add(0, u[i] * v[i]);
    if constexpr (Distances & ~kCosine) add(1, distance_of(Distances, u[i], v[i], per_feature));
  });
  rows.cosine = sums[0] * rows.u.to_unit * rows.v.to_unit;
  return (Distances & kCosine ? 1 - rows.cosine : A(0)) + sums[1];
}

// du = coefficient * distance' (+ what is there already, infonce's), then through the normalisation, in place.
template <int Distances, typename A>
void differentiate_row(int64_t normalize, A coefficient, const RowScale<A>& u_scale, const Comparison<A>& rows,
                       const A* u, const A* v, bool add_to_du, A* du, int64_t features) {
  const A per_feature = A(1) / static_cast<A>(features), to_unit = rows.u.to_unit * rows.v.to_unit;
  if (!add_to_du) std::fill(du, du + features, A(0));
  A sums[2];
  add_up(features, sums, [&](int64_t i, auto add) {
    du[i] += coefficient * distance_gradient_of(Distances, u[i], v[i], per_feature, to_unit);
    add(0, du[i]);
    add(1, u[i] * du[i]);
  });
  const ThroughNormalization<A> through(normalize, u_scale, sums[0], sums[1], coefficient * rows.cosine,
                                        static_cast<A>(features));
  for (int64_t i = 0; i < features; ++i) du[i] = through(u[i], du[i]);
}

}  // namespace fastprompt::alignment_loss
