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

// Of the similarities so many bytes are kept between forward and backward; of the other rows they are computed again.
constexpr int64_t kKeptBytes = 124 << 20;
constexpr int64_t kBlockBytes = 32 << 20;  // at a time: what the passes between two products find in a cache
constexpr int64_t kColumns = 1024;         // of a block at a time, likewise

// Log-sum-exps as greatest + logarithm: the loss subtracts the greatest first and so loses no digits.
template <typename A>
struct LogSumExp {
  std::vector<A> greatest, logarithm;
  explicit LogSumExp(int64_t count) : greatest(count, -std::numeric_limits<A>::infinity()), logarithm(count, A(0)) {}
};

template <typename A>
class Infonce {
 public:
  // u, v (rows, features), normalised, contiguous. Without `backward` there will be no gradients.
  Infonce(const Tensor& u, const Tensor& v, double temperature, bool backward)
      : u_(u), v_(v), rows_(u.size(0)), scale_(1 / temperature), of_rows_(rows_), of_columns_(rows_) {
    const int64_t row_bytes = rows_ * static_cast<int64_t>(sizeof(A));
    block_ = std::clamp<int64_t>(kBlockBytes / row_bytes, 1, rows_);
    const int64_t kept = backward ? std::clamp<int64_t>(kKeptBytes / row_bytes, block_, rows_) : block_;
    first_kept_ = rows_ - kept;
    similarity_ = empty_as(u, {kept, rows_});
  }

  // distance[i] += the cross-entropies of row i, averaged over both directions.
  void add_distances(A* distance) {
    std::vector<A> own(rows_);
    over_blocks(0, rows_, [&](int64_t first, const Tensor& block) {
      compute(first, block);
      const A* s = block.const_data_ptr<A>();
      const int64_t count = block.size(0);
      over_rows(count, rows_, [&](int64_t i) {
        own[first + i] = s[i * rows_ + first + i];
        take_row(s + i * rows_, first + i);
      });
      over_ranges(rows_, items_per_thread(count), [&](int64_t begin, int64_t end) {
        for (; begin < end; begin += kColumns) take_columns(s, count, begin, std::min(begin + kColumns, end));
      });
    });
    for (int64_t j = 0; j < rows_; ++j) of_columns_.logarithm[j] = std::log(of_columns_.logarithm[j]);
    for (int64_t i = 0; i < rows_; ++i)
      distance[i] -= ((own[i] - of_rows_.greatest[i] - of_rows_.logarithm[i]) +
                      (own[i] - of_columns_.greatest[i] - of_columns_.logarithm[i])) /
                     2;
  }

  // du, dv (rows, features): the gradients of sum_i coefficient[i] distance[i]; either may be null.
  void gradients(const A* coefficient, const Tensor* du, const Tensor* dv) {
    const auto differentiate = [&](int64_t first, const Tensor& block) {
      A* s = block.mutable_data_ptr<A>();
      over_rows(block.size(0), rows_, [&](int64_t i) { differentiate_row(s + i * rows_, first + i, coefficient); });
      const Tensor u = rows_of(u_, first, block.size(0));
      if (du) multiply_into(rows_of(*du, first, block.size(0)), block, v_);
      if (dv && first == first_kept_) multiply_into(*dv, transposed(block), u);
      if (dv && first != first_kept_) multiply_add_into(*dv, transposed(block), u);
    };
    over_blocks(first_kept_, rows_, differentiate);  // first, as the others take their place
    over_blocks(0, first_kept_, [&](int64_t first, const Tensor& block) {
      compute(first, block);
      differentiate(first, block);
    });
  }

 private:
  // f(first, block) for blocks of the rows [begin, end), with where their similarities stand.
  template <typename F>
  void over_blocks(int64_t begin, int64_t end, const F& f) const {
    for (int64_t first = begin, count; first < end; first += count) {
      count = std::min(block_, (first < first_kept_ ? first_kept_ : end) - first);
      f(first, rows_of(similarity_, std::max<int64_t>(0, first - first_kept_), count));
    }
  }

  // Similarities of rows from `first` on with all columns, over the temperature.
  void compute(int64_t first, const Tensor& block) const {
    multiply_into(block, rows_of(u_, first, block.size(0)), transposed(v_), scale_);
  }

  void take_row(const A* row, int64_t i) {
    const A greatest = greatest_of(row);
    A sum[1];
    add_up(rows_, sum, [&](int64_t j, auto add) { add(0, exponential(row[j] - greatest)); });
    of_rows_.greatest[i] = greatest;
    of_rows_.logarithm[i] = std::log(sum[0]);
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

  // Takes `count` more rows into the sums of columns [begin, end), which are not yet logarithms.
  void take_columns(const A* s, int64_t count, int64_t begin, int64_t end) {
    A greatest[kColumns], sum[kColumns] = {};
    const int64_t width = end - begin;
    A *before = of_columns_.greatest.data() + begin, *total = of_columns_.logarithm.data() + begin;
    std::copy_n(before, width, greatest);
    for (int64_t i = 0; i < count; ++i) {
      const A* row = s + i * rows_ + begin;
      for (int64_t j = 0; j < width; ++j) greatest[j] = greatest[j] < row[j] ? row[j] : greatest[j];
    }
    for (int64_t i = 0; i < count; ++i) {
      const A* row = s + i * rows_ + begin;
      for (int64_t j = 0; j < width; ++j) sum[j] += exponential(row[j] - greatest[j]);
    }
    for (int64_t j = 0; j < width; ++j) {
      total[j] = sum[j] + (total[j] == 0 ? A(0) : total[j] * exponential(before[j] - greatest[j]));
      before[j] = greatest[j];
    }
  }

  // From similarities to the derivatives by them, times the scale. The greatest is subtracted first, as it is near:
  // the sum of greatest and logarithm would be rounded.
  void differentiate_row(A* row, int64_t i, const A* coefficient) const {
    const A half = static_cast<A>(scale_) / 2, mine = half * coefficient[i];
    const A greatest = of_rows_.greatest[i], logarithm = of_rows_.logarithm[i];
    const A *greatest_of = of_columns_.greatest.data(), *logarithm_of = of_columns_.logarithm.data();
    for (int64_t j = 0; j < rows_; ++j) {
      const A by_row = row[j] - greatest - logarithm, by_column = row[j] - greatest_of[j] - logarithm_of[j];
      row[j] = mine * exponential(by_row) + half * coefficient[j] * exponential(by_column);
    }
    row[i] -= 2 * mine;
  }

  Tensor u_, v_, similarity_;
  int64_t rows_, block_, first_kept_;
  double scale_;
  LogSumExp<A> of_rows_, of_columns_;
};

}  // namespace fastprompt::alignment_loss
