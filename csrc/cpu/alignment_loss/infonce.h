// The contrast of every row with every other, a block of rows of the similarities at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../products.h"
#include "rows.h"

namespace fastprompt::alignment_loss {

using torch::stable::Tensor;

// All similarities are kept between forward and backward where they take no more than this; otherwise they are computed
// again, block by block.
constexpr int64_t kKeptBytes = 64 << 20;
constexpr int64_t kBlockBytes = 16 << 20;

// Log-sum-exps as greatest + logarithm: the loss subtracts the greatest first and so loses no digits.
template <typename A>
struct LogSumExp {
  std::vector<A> greatest, logarithm;
  explicit LogSumExp(int64_t count) : greatest(count, -std::numeric_limits<A>::infinity()), logarithm(count, A(0)) {}
};

template <typename A>
class Infonce {
 public:
  // u, v (rows, features), normalised, contiguous.
  Infonce(const Tensor& u, const Tensor& v, double temperature)
      : u_(u), v_(v), rows_(u.size(0)), scale_(static_cast<A>(1 / temperature)), of_rows_(rows_), of_columns_(rows_) {
    const int64_t row_bytes = rows_ * static_cast<int64_t>(sizeof(A));
    kept_ = rows_ * row_bytes <= kKeptBytes;
    block_ = kept_ ? rows_ : std::max<int64_t>(1, kBlockBytes / row_bytes);
    similarity_ = empty_as(u, {std::min(block_, rows_), rows_});
  }

  // distance[i] += the cross-entropies of row i, averaged over both directions.
  void add_distances(A* distance) {
    std::vector<A> own(rows_);
    for (int64_t first = 0; first < rows_; first += block_) {
      const int64_t count = compute(first);
      const A* s = similarity_.const_data_ptr<A>();
      over(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const A* row = s + i * rows_;
          own[first + i] = row[first + i];
          const A greatest = greatest_of(row);
          A sum[1];
          add_up(rows_, sum, [&](int64_t j, auto add) { add(0, exponential(row[j] - greatest)); });
          of_rows_.greatest[first + i] = greatest;
          of_rows_.logarithm[first + i] = std::log(sum[0]);
        }
      });
      over(rows_, [&](int64_t begin, int64_t end) { add_to_columns(s, count, begin, end); });
    }
    for (int64_t j = 0; j < rows_; ++j) of_columns_.logarithm[j] = std::log(of_columns_.logarithm[j]);
    for (int64_t i = 0; i < rows_; ++i)
      distance[i] -= ((own[i] - of_rows_.greatest[i] - of_rows_.logarithm[i]) +
                      (own[i] - of_columns_.greatest[i] - of_columns_.logarithm[i])) /
                     2;
  }

  // du, dv (rows, features): the gradients of sum_i coefficient[i] distance[i]; either may be null.
  void gradients(const A* coefficient, const Tensor* du, const Tensor* dv) {
    for (int64_t first = 0; first < rows_; first += block_) {
      const int64_t count = kept_ ? rows_ : compute(first);
      A* s = similarity_.mutable_data_ptr<A>();
      over(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          A* row = s + i * rows_;
          const A half = scale_ / 2, mine = half * coefficient[first + i];
          const A greatest = of_rows_.greatest[first + i], logarithm = of_rows_.logarithm[first + i];
          const A *greatest_of = of_columns_.greatest.data(), *logarithm_of = of_columns_.logarithm.data();
          for (int64_t j = 0; j < rows_; ++j) {  // the greatest first, as it is near: their sum would be rounded
            const A by_row = row[j] - greatest - logarithm, by_column = row[j] - greatest_of[j] - logarithm_of[j];
            row[j] = mine * exponential(by_row) + half * coefficient[j] * exponential(by_column);
          }
          row[first + i] -= 2 * mine;
        }
      });
      const Tensor block = rows_of(similarity_, 0, count);
      if (du) multiply_into(rows_of(*du, first, count), block, v_);
      if (dv && first == 0) multiply_into(*dv, transposed(block), rows_of(u_, first, count));
      if (dv && first > 0) multiply_add_into(*dv, transposed(block), rows_of(u_, first, count));
    }
  }

 private:
  template <typename F>
  void over(int64_t count, const F& f) const {
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, (1 << 15) / rows_), f);
  }

  A greatest_of(const A* row) const {
    A lanes[kLanes];
    std::fill(lanes, lanes + kLanes, row[0]);
    int64_t j = 0;
    for (; j + kLanes <= rows_; j += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] = lanes[k] < row[j + k] ? row[j + k] : lanes[k];
    for (; j < rows_; ++j) lanes[0] = lanes[0] < row[j] ? row[j] : lanes[0];
    return *std::max_element(lanes, lanes + kLanes);
  }

  // Similarities of rows from `first` on with all columns, over the temperature. Returns the number of rows.
  int64_t compute(int64_t first) {
    const int64_t count = std::min(block_, rows_ - first);
    multiply_into(rows_of(similarity_, 0, count), rows_of(u_, first, count), transposed(v_));
    A* s = similarity_.mutable_data_ptr<A>();
    over(count, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin * rows_; e < end * rows_; ++e) s[e] *= scale_;
    });
    return count;
  }

  // Takes `count` more rows into the sums of columns [begin, end).
  void add_to_columns(const A* s, int64_t count, int64_t begin, int64_t end) {
    A* greatest = of_columns_.greatest.data();
    A* sum = of_columns_.logarithm.data();  // not yet its logarithm
    std::vector<A> before(greatest + begin, greatest + end);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = begin; j < end; ++j) {
        const A x = s[i * rows_ + j];
        greatest[j] = greatest[j] < x ? x : greatest[j];
      }
    for (int64_t j = begin; j < end; ++j)
      sum[j] = sum[j] == 0 ? A(0) : sum[j] * exponential(before[j - begin] - greatest[j]);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = begin; j < end; ++j) sum[j] += exponential(s[i * rows_ + j] - greatest[j]);
  }

  Tensor u_, v_, similarity_;
  int64_t rows_, block_;
  bool kept_;
  A scale_;
  LogSumExp<A> of_rows_, of_columns_;
};

}  // namespace fastprompt::alignment_loss
