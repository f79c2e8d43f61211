// alignment_loss on the CPU. Chunk by chunk: project, normalise, compare and differentiate rows in place, and the
// products that carry the gradient on. A chunk is some thousand rows; with infonce, where every row meets every other,
// all of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../../common/dispatch.h"
#include "../../common/tensors.h"
#include "../products.h"
#include "infonce.h"
#include "rows.h"

namespace fastprompt::alignment_loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunkElements = 1 << 19;  // 2 MB in float32: products of such chunks run at their full rate

struct Needs {
  bool student, teacher, weight, bias, row_weight;
  bool z() const { return student || weight || bias; }
};

// Calls f with the elementwise distances as a constant, so that loops over features do not ask.
template <typename F>
void dispatch_distances(int64_t distances, const F& f) {
  switch (distances & ~kInfonce) {
#define FASTPROMPT_CASE(D) \
  case D:                  \
    return f(std::integral_constant<int, D>{});
    FASTPROMPT_CASE(0)
    FASTPROMPT_CASE(1)
    FASTPROMPT_CASE(2)
    FASTPROMPT_CASE(3)
    FASTPROMPT_CASE(4)
    FASTPROMPT_CASE(5)
    FASTPROMPT_CASE(6)
    FASTPROMPT_CASE(7)
#undef FASTPROMPT_CASE
  }
}

// T is what tensors hold, A what is computed in. Only rows of a weight other than 0 are ever read.
template <typename T>
struct Call {
  using A = accumulate_t<T>;

  Tensor student, teacher, weight;  // weight in A
  const A* bias;
  int64_t normalize, distances;
  double temperature;
  Needs needs;
  std::vector<int64_t> kept;                                  // rows that count
  std::vector<A> coefficient;                                 // of each of them in the sum that is differentiated
  std::vector<A> distance;                                    // of each of them: the result
  Tensor grad_student, grad_teacher, grad_weight, grad_bias;  // grad_weight and grad_bias in A

  void run() {
    const int64_t rows = std::ssize(kept), features = teacher.size(1);
    if (rows == 0) return;
    const bool contrast = distances & kInfonce;
    const int64_t most =
        contrast ? rows : std::clamp<int64_t>(kChunkElements / std::max<int64_t>(1, features), 1, rows);
    const int64_t chunks = (rows + most - 1) / most, size = (rows + chunks - 1) / chunks;
    // u and v hold normalised rows; du and dv their gradients.
    Tensor u = empty_as(weight, {size, features}), v = empty_as(weight, {size, features});
    Tensor du, dv;
    if (needs.z()) du = empty_as(weight, {size, features});
    if (needs.teacher) dv = empty_as(weight, {size, features});
    for (int64_t first = 0; first < rows; first += size) {
      const int64_t count = std::min(size, rows - first);
      const auto part = [&](const Tensor& t) { return count == size ? t : rows_of(t, 0, count); };
      chunk(first, count, part(u), part(v), needs.z() ? part(du) : du, needs.teacher ? part(dv) : dv);
    }
  }

 private:
  void chunk(int64_t first, int64_t count, const Tensor& u, const Tensor& v, const Tensor& du, const Tensor& dv) {
    const int64_t features = teacher.size(1);
    const Tensor hidden = load_rows(first, count);
    multiply_into(u, hidden, transposed(weight));
    std::vector<Comparison<A>> comparisons(count);
    A* u_rows = u.mutable_data_ptr<A>();
    A* v_rows = v.mutable_data_ptr<A>();
    const T* targets = teacher.const_data_ptr<T>();
    T* grad_targets = needs.teacher ? grad_teacher.mutable_data_ptr<T>() : nullptr;
    A* du_rows = needs.z() ? du.mutable_data_ptr<A>() : nullptr;
    A* dv_rows = needs.teacher ? dv.mutable_data_ptr<A>() : nullptr;
    const bool contrast = distances & kInfonce;
    const auto compare = [&](int64_t i, auto which) {
      A *u_row = u_rows + i * features, *v_row = v_rows + i * features;
      const T* target = targets + kept[first + i] * features;
      if (bias)
        for (int64_t k = 0; k < features; ++k) u_row[k] += bias[k];
      std::copy_n(target, features, v_row);
      Comparison<A>& rows = comparisons[i];
      rows.u = normalize_row<which>(normalize, u_row, features);
      rows.v = normalize_row<which>(normalize, v_row, features);
      distance[first + i] = compare_rows<which>(u_row, v_row, features, rows);
    };
    const auto differentiate = [&](int64_t i, auto which) {
      const A *u_row = u_rows + i * features, *v_row = v_rows + i * features;
      const A c = coefficient[first + i];
      const Comparison<A>& rows = comparisons[i];
      if (du_rows) {
        A* row = du_rows + i * features;
        differentiate_row<which>(normalize, c, rows.u, rows, u_row, v_row, contrast, row, features);
      }
      if (dv_rows) {
        A* row = dv_rows + i * features;
        differentiate_row<which>(normalize, c, rows.v, rows, v_row, u_row, contrast, row, features);
        std::copy_n(row, features, grad_targets + kept[first + i] * features);
      }
    };
    dispatch_distances(distances, [&](auto which) {
      if (!contrast)  // while the row is at hand
        return over_rows(count, features, [&](int64_t i) { compare(i, which), differentiate(i, which); });
      over_rows(count, features, [&](int64_t i) { compare(i, which); });
      Infonce<A> infonce(u, v, temperature, du_rows || dv_rows);
      infonce.add_distances(distance.data());
      if (!du_rows && !dv_rows) return;
      infonce.gradients(coefficient.data(), du_rows ? &du : nullptr, dv_rows ? &dv : nullptr);
      over_rows(count, features, [&](int64_t i) { differentiate(i, which); });
    });
    if (needs.student) store_student_gradient(first, count, du);
    if (needs.weight && first == 0) multiply_into(grad_weight, transposed(du), hidden);
    if (needs.weight && first > 0) multiply_add_into(grad_weight, transposed(du), hidden);
    if (needs.bias) add_columns(du);
  }

  bool consecutive(int64_t first, int64_t count) const { return kept[first + count - 1] - kept[first] == count - 1; }

  // The student's rows in A: as they lie where they can be taken so.
  Tensor load_rows(int64_t first, int64_t count) const {
    if (std::is_same_v<T, A> && consecutive(first, count)) return rows_of(student, kept[first], count);
    const int64_t width = student.size(1);
    Tensor rows = empty_as(weight, {count, width});
    const T* from = student.const_data_ptr<T>();
    A* to = rows.mutable_data_ptr<A>();
    over_rows(count, width, [&](int64_t i) { std::copy_n(from + kept[first + i] * width, width, to + i * width); });
    return rows;
  }

  void store_student_gradient(int64_t first, int64_t count, const Tensor& du) const {
    if (std::is_same_v<T, A> && consecutive(first, count))
      return multiply_into(rows_of(grad_student, kept[first], count), du, weight);
    const int64_t width = student.size(1);
    Tensor rows = empty_as(weight, {count, width});
    multiply_into(rows, du, weight);
    const A* from = rows.const_data_ptr<A>();
    T* to = grad_student.mutable_data_ptr<T>();
    over_rows(count, width, [&](int64_t i) { std::copy_n(from + i * width, width, to + kept[first + i] * width); });
  }

  void add_columns(const Tensor& du) const {
    const int64_t rows = du.size(0), features = du.size(1);
    const A* from = du.const_data_ptr<A>();
    A* sum = grad_bias.mutable_data_ptr<A>();
    torch::stable::parallel_for(
        0, features, std::max<int64_t>(64, items_per_thread(rows)), [&](int64_t begin, int64_t end) {
          std::vector<double> columns(end - begin);  // one row after the other, float32 would lose digits
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = begin; k < end; ++k) columns[k - begin] += from[i * features + k];
          for (int64_t k = begin; k < end; ++k) sum[k] += static_cast<A>(columns[k - begin]);
        });
  }
};

Tensor gradient_like(const Tensor& tensor, bool needed, bool zero) {
  if (!needed) return empty_as(tensor, {0});
  return zero ? zeros_as(tensor, tensor.sizes()) : empty_as(tensor, tensor.sizes());
}

// The loss, and the gradients of it that are needed (the others empty). Under reduction kRows these are of
// sum_i row_grad[i] * loss[i]. row_weight and row_grad are in A.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> alignment_loss(
    const Tensor& student, const Tensor& teacher, const Tensor& weight_, const std::optional<Tensor>& bias_,
    const std::optional<Tensor>& row_weight_, const std::optional<Tensor>& row_grad_, int64_t normalize,
    int64_t distances, double temperature, int64_t reduction, bool needs_student, bool needs_teacher, bool needs_weight,
    bool needs_bias, bool needs_row_weight) {
  const int64_t rows = student.size(0);
  const auto contiguous_or_none = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
  };
  const std::optional<Tensor> row_weight = contiguous_or_none(row_weight_), row_grad = contiguous_or_none(row_grad_);
  Tensor loss, grad_row_weight;
  Tensor grad_student, grad_teacher, grad_weight, grad_bias;
  dispatch_floating(student.scalar_type(), "alignment_loss", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const auto in_type = [](const Tensor& t, ScalarType to) {
      return t.scalar_type() == to ? as_contiguous(t) : as_contiguous(torch::stable::to(t, to));
    };
    Call<T> call;
    call.student = as_contiguous(student);
    call.teacher = as_contiguous(teacher);
    call.weight = in_type(weight_, type);
    const std::optional<Tensor> bias = bias_ ? std::optional<Tensor>(in_type(*bias_, type)) : std::nullopt;
    call.bias = bias ? bias->const_data_ptr<A>() : nullptr;
    call.normalize = normalize;
    call.distances = distances;
    call.temperature = temperature;
    call.needs = {needs_student, needs_teacher, needs_weight, needs_bias && bias, needs_row_weight && row_weight};

    const A* given = row_weight ? row_weight->const_data_ptr<A>() : nullptr;
    const A* row_grads = row_grad ? row_grad->const_data_ptr<A>() : nullptr;
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const A w = given ? given[i] : A(1);
      total += w;
      if (w != 0) call.kept.push_back(i);
    }
    const int64_t kept = static_cast<int64_t>(call.kept.size());
    const A share = reduction == kMean && total != 0 ? static_cast<A>(1 / total) : A(1);
    call.coefficient.assign(kept, share);
    call.distance.assign(kept, A(0));
    for (int64_t i = 0; i < kept; ++i) {
      if (given) call.coefficient[i] *= given[call.kept[i]];
      if (row_grads) call.coefficient[i] *= row_grads[call.kept[i]];
    }
    const bool gaps = kept < rows;
    call.grad_student = gradient_like(student, needs_student, gaps);
    call.grad_teacher = gradient_like(teacher, needs_teacher, gaps);
    call.grad_weight = gradient_like(call.weight, needs_weight, kept == 0);
    call.grad_bias = bias ? gradient_like(*bias, needs_bias, true) : empty_as(student, {0});
    call.run();

    grad_student = call.grad_student;
    grad_teacher = call.grad_teacher;
    grad_weight = in_type(call.grad_weight, weight_.scalar_type());
    grad_bias = in_type(call.grad_bias, student.scalar_type());
    grad_row_weight = zeros_as(call.weight, {call.needs.row_weight ? rows : 0});
    A* grad_w = grad_row_weight.mutable_data_ptr<A>();
    if (reduction == kRows) {
      loss = zeros_as(call.weight, {rows});
      A* out = loss.mutable_data_ptr<A>();
      for (int64_t i = 0; i < kept; ++i) {
        const int64_t row = call.kept[i];
        out[row] = call.distance[i] * (given ? given[row] : A(1));
        if (call.needs.row_weight) grad_w[row] = call.distance[i] * (row_grads ? row_grads[row] : A(1));
      }
      return;
    }
    double sum = 0;
    for (int64_t i = 0; i < kept; ++i) sum += static_cast<double>(call.coefficient[i]) * call.distance[i];
    loss = empty_as(call.weight, {});
    *loss.mutable_data_ptr<A>() = static_cast<A>(sum);
    // The mean is a quotient: raising a weight also raises what is divided by.
    const A subtrahend = reduction == kMean && total != 0 ? static_cast<A>(sum) : A(0);
    if (call.needs.row_weight)
      for (int64_t i = 0; i < kept; ++i) grad_w[call.kept[i]] = share * (call.distance[i] - subtrahend);
  });
  return {loss, grad_student, grad_teacher, grad_weight, grad_bias, grad_row_weight};
}

}  // namespace
}  // namespace fastprompt::alignment_loss

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) {
  library.impl("alignment_loss", TORCH_BOX(&fastprompt::alignment_loss::alignment_loss));
}
