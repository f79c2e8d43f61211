// alignment_loss on CUDA, for vectors of sentences: few rows, where launches are the cost. The products are the
// library's; between them a warp takes a row through normalisation, distance and back.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../common/alignment_rows.h"
#include "../common/dispatch.h"
#include "../common/tensors.h"
#include "launch.h"

namespace fastprompt::alignment_loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32, kWarps = 4;  // rows of a block

template <typename A>
__device__ A sum_over_warp(A x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

template <typename A>
__device__ A greatest_of_warp(A x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = x < other ? other : x;
  }
  return x;
}

// One row as it is normalised: (x - mean) * scale.factor.
template <typename T, typename A>
struct Row {
  const T* data;
  const A* bias;  // added to it, or null
  A mean;
  RowScale<A> scale;

  __device__ A raw(int64_t k) const { return static_cast<A>(data[k]) + (bias ? bias[k] : A(0)); }
  __device__ A operator[](int64_t k) const { return (raw(k) - mean) * scale.factor; }
};

// By all lanes of a warp together.
template <typename T, typename A>
__device__ Row<T, A> normalized(const T* data, const A* bias, int64_t normalize, int distances, int64_t features) {
  const int lane = threadIdx.x % kWarp;
  Row<T, A> row{data, bias, A(0), {}};
  if (normalize == kNone && !(distances & kCosine)) return row;
  A sum = 0;
  if (normalize == kLayer) {
    const A first = row.raw(0);  // less that, a row of equal features is exactly zero
    for (int64_t k = lane; k < features; k += kWarp) sum += row.raw(k) - first;
    row.mean = first + sum_over_warp(sum) / static_cast<A>(features);
  }
  sum = 0;
  for (int64_t k = lane; k < features; k += kWarp) sum += (row.raw(k) - row.mean) * (row.raw(k) - row.mean);
  row.scale = RowScale<A>(normalize, sum_over_warp(sum), static_cast<A>(features));
  return row;
}

template <typename T, typename A>
struct Problem {
  const T *z, *teacher;
  const A *bias, *row_weight, *row_grad;  // each may be null
  int64_t rows, features, normalize, reduction;
  int distances;
  A scale;  // 1 / temperature

  __device__ bool counts(int64_t row) const { return !row_weight || row_weight[row] != A(0); }
  // What a row's distance is multiplied by in the sum that is differentiated; by all lanes of a warp together.
  __device__ A coefficient(int64_t row) const {
    A c = row_weight ? row_weight[row] : A(1);
    if (row_grad) c *= row_grad[row];
    return c * share();
  }
  __device__ A share() const {
    if (reduction != kMean) return A(1);
    if (!row_weight) return A(1) / static_cast<A>(rows);
    A total = 0;
    for (int64_t i = threadIdx.x % kWarp; i < rows; i += kWarp) total += row_weight[i];
    total = sum_over_warp(total);
    return total == A(0) ? A(1) : A(1) / total;
  }
};

__device__ inline int64_t row_of_warp() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; }

// units (2, rows, features): both sides' normalised rows, for infonce. A row that does not count is zero.
template <typename T, typename A>
__global__ void write_units(Problem<T, A> problem, A* units) {
  const int64_t row = row_of_warp(), features = problem.features;
  if (row >= problem.rows) return;
  for (int side = 0; side < 2; ++side) {
    const T* data = (side ? problem.teacher : problem.z) + row * features;
    A* unit = units + (side * problem.rows + row) * features;
    const bool counts = problem.counts(row);
    Row<T, A> u{};
    if (counts) u = normalized(data, side ? nullptr : problem.bias, problem.normalize, kInfonce, features);
    for (int64_t k = threadIdx.x % kWarp; k < features; k += kWarp) unit[k] = counts ? u[k] : A(0);
  }
}

// sums (4, rows): greatest and logarithm of the sum of e^(s - greatest), of rows and then of columns of s (rows, rows).
template <typename T, typename A>
__global__ void sum_similarities(Problem<T, A> problem, const A* similarity, A* sums) {
  const int64_t index = row_of_warp(), rows = problem.rows;
  if (index >= 2 * rows) return;
  const bool column = index >= rows;
  const int64_t own = column ? index - rows : index;
  const A* first = similarity + (column ? own : own * rows);
  const int64_t step = column ? rows : 1;
  A greatest = -INFINITY, sum = 0;
  for (int64_t j = threadIdx.x % kWarp; j < rows; j += kWarp) {
    const A s = first[j * step] * problem.scale;
    if (problem.counts(j) && s > greatest) greatest = s;
  }
  greatest = greatest_of_warp(greatest);
  for (int64_t j = threadIdx.x % kWarp; j < rows; j += kWarp)
    if (problem.counts(j)) sum += exp(first[j * step] * problem.scale - greatest);
  sum = sum_over_warp(sum);
  if (threadIdx.x % kWarp == 0) {
    sums[(column ? 2 : 0) * rows + own] = greatest;
    sums[(column ? 3 : 1) * rows + own] = log(sum);
  }
}

// The similarities become the loss's gradient by the products u v^T; distance (rows) is infonce's.
template <typename T, typename A>
__global__ void contrast(Problem<T, A> problem, A* similarity, const A* sums, A* distance) {
  const int64_t row = row_of_warp(), rows = problem.rows;
  if (row >= rows) return;
  const A half = problem.scale / 2;
  const A share = problem.share(), *greatest = sums, *logarithm = sums + rows;
  const A *column_greatest = sums + 2 * rows, *column_logarithm = sums + 3 * rows;
  const auto coefficient = [&](int64_t i) {
    return share * (problem.row_weight ? problem.row_weight[i] : A(1)) *
           (problem.row_grad ? problem.row_grad[i] : A(1));
  };
  for (int64_t j = threadIdx.x % kWarp; j < rows; j += kWarp) {
    A& s = similarity[row * rows + j];
    if (!problem.counts(row) || !problem.counts(j)) {
      s = 0;
      continue;
    }
    const A x = s * problem.scale;
    const A by_row = x - greatest[row] - logarithm[row], by_column = x - column_greatest[j] - column_logarithm[j];
    if (j == row) distance[row] = -(by_row + by_column) / 2;
    s = half * (coefficient(row) * exp(by_row) + coefficient(j) * exp(by_column));
    if (j == row) s -= 2 * half * coefficient(row);
  }
}

// Distances of rows, and z and the teacher's gradient from that of the units: du, dv (rows, features) are infonce's, or
// null. grad_z and grad_teacher may be null; grad_z may be z. kept_hidden, if given, gets the student's rows that
// count.
template <typename T, typename A>
__global__ void differentiate(Problem<T, A> problem, const A* infonce, const A* du, const A* dv, A* distance, T* grad_z,
                              T* grad_teacher, const T* hidden, T* kept_hidden, int64_t width) {
  const int64_t row = row_of_warp(), features = problem.features;
  const int lane = threadIdx.x % kWarp;
  if (row >= problem.rows) return;
  const bool counts = problem.counts(row);
  if (kept_hidden)
    for (int64_t k = lane; k < width; k += kWarp)
      kept_hidden[row * width + k] = counts ? hidden[row * width + k] : T(0);
  if (!counts) {
    for (int64_t k = lane; k < features; k += kWarp) {
      if (grad_z) grad_z[row * features + k] = T(0);
      if (grad_teacher) grad_teacher[row * features + k] = T(0);
    }
    if (lane == 0) distance[row] = 0;
    return;
  }
  const A per_feature = A(1) / static_cast<A>(features), c = problem.coefficient(row);
  const int distances = problem.distances;
  const Row<T, A> u = normalized(problem.z + row * features, problem.bias, problem.normalize, distances, features);
  const Row<T, A> v = normalized(problem.teacher + row * features, static_cast<const A*>(nullptr), problem.normalize,
                                 distances, features);
  const A to_unit = u.scale.to_unit * v.scale.to_unit;
  const auto gradient = [&](const A* given, A own, A other, int64_t k) {
    const A from_infonce = given ? given[row * features + k] : A(0);
    return from_infonce + c * distance_gradient_of(distances, own, other, per_feature, to_unit);
  };
  A sum = 0, cosine = 0, sum_du = 0, sum_u_du = 0, sum_dv = 0, sum_v_dv = 0;
  for (int64_t k = lane; k < features; k += kWarp) {
    sum += distance_of(distances, u[k], v[k], per_feature);
    if (distances & kCosine) cosine += u[k] * v[k];
    const A du_k = gradient(du, u[k], v[k], k), dv_k = gradient(dv, v[k], u[k], k);
    sum_du += du_k;
    sum_u_du += u[k] * du_k;
    sum_dv += dv_k;
    sum_v_dv += v[k] * dv_k;
  }
  sum = sum_over_warp(sum);
  cosine = sum_over_warp(cosine) * to_unit;
  if (lane == 0) distance[row] = sum + (distances & kCosine ? 1 - cosine : A(0)) + (infonce ? infonce[row] : A(0));
  if (!grad_z && !grad_teacher) return;
  const A f = static_cast<A>(features);
  const ThroughNormalization<A> to_z(problem.normalize, u.scale, sum_over_warp(sum_du), sum_over_warp(sum_u_du),
                                     c * cosine, f);
  const ThroughNormalization<A> to_t(problem.normalize, v.scale, sum_over_warp(sum_dv), sum_over_warp(sum_v_dv),
                                     c * cosine, f);
  for (int64_t k = lane; k < features; k += kWarp) {
    const A u_k = u[k], v_k = v[k];  // before grad_z, which may lie where u is read
    if (grad_z) grad_z[row * features + k] = static_cast<T>(to_z(u_k, gradient(du, u_k, v_k, k)));
    if (grad_teacher) grad_teacher[row * features + k] = static_cast<T>(to_t(v_k, gradient(dv, v_k, u_k, k)));
  }
}

// One warp: the loss of the distances, and the gradient of row_weight where grad_row_weight is given.
template <typename T, typename A>
__global__ void reduce(Problem<T, A> problem, const A* distance, A* loss, A* grad_row_weight) {
  const int lane = threadIdx.x;
  const A share = problem.share();
  A total = 0, weights = 0;
  for (int64_t i = lane; i < problem.rows; i += kWarp) {
    const A w = problem.row_weight ? problem.row_weight[i] : A(1);
    if (problem.reduction == kRows) loss[i] = w * distance[i];
    if (w != A(0)) total += w * distance[i];
    weights += w;
  }
  total = share * sum_over_warp(total);
  weights = sum_over_warp(weights);
  if (problem.reduction != kRows && lane == 0) *loss = total;
  if (!grad_row_weight) return;
  // The mean is a quotient: raising a weight also raises what is divided by.
  const A subtrahend = problem.reduction == kMean && weights != A(0) ? total : A(0);
  for (int64_t i = lane; i < problem.rows; i += kWarp) {
    const A by_row = problem.row_grad ? problem.row_grad[i] : share;
    grad_row_weight[i] = problem.counts(i) ? by_row * (distance[i] - subtrahend) : A(0);
  }
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

template <typename T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr<T>() : nullptr;
}

// See csrc/cpu/alignment_loss/alignment_loss.cpp.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> alignment_loss(
    const Tensor& student_, const Tensor& teacher_, const Tensor& weight_, const std::optional<Tensor>& bias_,
    const std::optional<Tensor>& row_weight_, const std::optional<Tensor>& row_grad_, int64_t normalize,
    int64_t distances, double temperature, int64_t reduction, bool needs_student, bool needs_teacher, bool needs_weight,
    bool needs_bias, bool needs_row_weight) {
  using torch::stable::new_empty;
  const torch::stable::accelerator::DeviceGuard guard(student_.get_device_index());
  const Tensor student = as_contiguous(student_), teacher = as_contiguous(teacher_), weight = as_contiguous(weight_);
  const int64_t rows = student.size(0), width = student.size(1), features = teacher.size(1);
  const cudaStream_t stream = current_stream(student);
  const dim3 blocks(static_cast<unsigned>((rows + kWarps - 1) / kWarps));
  const Tensor none = new_empty(student, {0});
  Tensor loss, grad_row_weight, grad_student = none, grad_teacher = none, grad_weight = none, grad_bias = none;
  dispatch_floating(student.scalar_type(), "alignment_loss", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const auto new_sums = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) {
      return new_empty(student, sizes, type);
    };
    const auto in_sums = [&](const std::optional<Tensor>& t) {
      return t ? std::optional<Tensor>(as_contiguous(torch::stable::to(*t, type))) : std::nullopt;
    };
    const std::optional<Tensor> bias = in_sums(bias_), row_weight = in_sums(row_weight_), row_grad = in_sums(row_grad_);
    const Tensor z = torch::stable::matmul(student, transposed(weight));
    const bool needs_z = needs_student || needs_weight || (needs_bias && bias);
    Problem<T, A> problem{z.const_data_ptr<T>(),
                          teacher.const_data_ptr<T>(),
                          data_or_null<A>(bias),
                          data_or_null<A>(row_weight),
                          data_or_null<A>(row_grad),
                          rows,
                          features,
                          normalize,
                          reduction,
                          static_cast<int>(distances),
                          static_cast<A>(1 / temperature)};

    Tensor units, infonce, du, dv;
    if (distances & kInfonce) {
      units = new_sums({2, rows, features});
      launch(write_units<T, A>, blocks, kWarps * kWarp, 0, stream, problem, units.mutable_data_ptr<A>());
      const Tensor u = torch::stable::select(units, 0, 0), v = torch::stable::select(units, 0, 1);
      const Tensor similarity = torch::stable::matmul(u, transposed(v)), sums = new_sums({4, rows});
      launch(sum_similarities<T, A>, dim3(static_cast<unsigned>((2 * rows + kWarps - 1) / kWarps)), kWarps * kWarp, 0,
             stream, problem, similarity.const_data_ptr<A>(), sums.mutable_data_ptr<A>());
      infonce = new_sums({rows});
      launch(contrast<T, A>, blocks, kWarps * kWarp, 0, stream, problem, similarity.mutable_data_ptr<A>(),
             sums.const_data_ptr<A>(), infonce.mutable_data_ptr<A>());
      if (needs_z) du = torch::stable::matmul(similarity, v);
      if (needs_teacher) dv = torch::stable::matmul(transposed(similarity), u);
    }

    const auto given = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<A>() : nullptr; };
    const Tensor distance = new_sums({rows});
    if (needs_teacher) grad_teacher = torch::stable::empty_like(teacher);
    // 0 times what may be no number: rows that do not count are no part of the weight's gradient.
    Tensor hidden = student;
    if (needs_weight && row_weight) hidden = torch::stable::empty_like(student);
    launch(differentiate<T, A>, blocks, kWarps * kWarp, 0, stream, problem, given(infonce), given(du), given(dv),
           distance.mutable_data_ptr<A>(), needs_z ? z.mutable_data_ptr<T>() : nullptr,
           needs_teacher ? grad_teacher.mutable_data_ptr<T>() : nullptr, student.const_data_ptr<T>(),
           needs_weight && row_weight ? hidden.mutable_data_ptr<T>() : nullptr, width);
    if (needs_student) grad_student = torch::stable::matmul(z, weight);
    if (needs_weight) grad_weight = torch::stable::matmul(transposed(z), hidden);
    if (needs_bias && bias) {
      const int64_t over[] = {0};
      grad_bias = torch::stable::sum(z, torch::headeronly::IntHeaderOnlyArrayRef(over, 1));
    }
    loss = reduction == kRows ? new_sums({rows}) : new_sums({});
    grad_row_weight = new_sums({needs_row_weight && row_weight ? rows : 0});
    launch(reduce<T, A>, dim3(1), kWarp, 0, stream, problem, distance.const_data_ptr<A>(), loss.mutable_data_ptr<A>(),
           needs_row_weight && row_weight ? grad_row_weight.mutable_data_ptr<A>() : nullptr);
  });
  return {loss, grad_student, grad_teacher, grad_weight, grad_bias, grad_row_weight};
}

}  // namespace
}  // namespace fastprompt::alignment_loss

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CUDA, library) {
  library.impl("alignment_loss", TORCH_BOX(&fastprompt::alignment_loss::alignment_loss));
}
