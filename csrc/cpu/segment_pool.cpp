// segment_mean, segment_first and segment_last on the CPU. All are a mean over some rows of each segment; `take` says
// which: 0 all, 1 the first, -1 the last.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/dispatch.h"
#include "../common/packed_rows.h"
#include "../common/tensors.h"
#include "checks.h"
#include "rows.h"

namespace fastprompt {
namespace {

using torch::stable::Tensor;

constexpr int64_t kColumns = 1024, kFewestColumns = 128;  // of a task: the most keep the sums in L1

struct Rows {
  int64_t begin, end;
};

Rows taken_rows(const PackedRows& packed, int64_t segment, int64_t take) {
  const int64_t begin = packed.begin(segment), end = packed.begin(segment + 1);
  if (take == 0 || begin == end) return {begin, end};
  return take > 0 ? Rows{begin, begin + 1} : Rows{end - 1, end};
}

// to[0:columns] = the mean of rows that lie `width` apart; 0 if there are none.
template <typename T>
void mean_of_rows(const T* in, Rows rows, int64_t width, int64_t columns, T* to) {
  using A = accumulate_t<T>;
  A sum[kColumns] = {};
  int64_t row = rows.begin;
  for (; row + 4 <= rows.end; row += 4) {  // a load and a store of the sum for four rows
    const T *a = in + row * width, *b = a + width, *c = b + width, *d = c + width;
    for (int64_t e = 0; e < columns; ++e)
      sum[e] += (static_cast<A>(a[e]) + static_cast<A>(b[e])) + (static_cast<A>(c[e]) + static_cast<A>(d[e]));
  }
  for (; row < rows.end; ++row)
    for (int64_t e = 0; e < columns; ++e) sum[e] += static_cast<A>(in[row * width + e]);
  const A count = static_cast<A>(std::max<int64_t>(1, rows.end - rows.begin));
  for (int64_t e = 0; e < columns; ++e) to[e] = static_cast<T>(sum[e] / count);
}

// Whole rows are the fastest to read. Few segments are divided by columns as well, so that threads share a long one.
int64_t columns_of_task(int64_t segments, int64_t width) {
  const int64_t threads = torch::stable::get_num_threads();
  return segments >= 4 * threads ? kColumns : std::clamp((width + threads - 1) / threads, kFewestColumns, kColumns);
}

Tensor segment_pool(const Tensor& hidden_, const Tensor& cu_seqlens_, int64_t take) {
  const Tensor hidden = as_contiguous(hidden_), cu_seqlens = as_contiguous(cu_seqlens_);
  const int64_t rows = hidden.size(0), width = hidden.size(1), segments = cu_seqlens.size(0) - 1;
  const PackedRows packed{cu_seqlens.const_data_ptr<int32_t>(), segments, 0};
  check_segments(packed.cu_seqlens, segments, rows);
  const int64_t columns = columns_of_task(segments, width);
  Tensor pooled = empty_as(hidden, {segments, width});
  dispatch_floating(hidden.scalar_type(), "segment_pool", [&](auto zero) {
    using T = decltype(zero);
    const T* in = hidden.const_data_ptr<T>();
    T* out = pooled.mutable_data_ptr<T>();
    const int64_t blocks = (width + columns - 1) / columns;
    const int64_t read = take == 0 && segments > 0 ? rows / segments : 1;  // rows of a task
    over_ranges(blocks * segments, items_per_thread(read * columns), [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task / segments * columns, segment = task % segments;
        const int64_t count = std::min(columns, width - begin);
        mean_of_rows(in + begin, taken_rows(packed, segment, take), width, count, out + segment * width + begin);
      }
    });
  });
  return pooled;
}

// Each row of the result once: its segment's gradient over the number of rows taken if it is one of these, else 0.
Tensor segment_pool_backward(const Tensor& grad_, const Tensor& cu_seqlens_, int64_t rows, int64_t take) {
  const Tensor grad = as_contiguous(grad_), cu_seqlens = as_contiguous(cu_seqlens_);
  const int64_t width = grad.size(1), segments = cu_seqlens.size(0) - 1;
  const PackedRows packed{cu_seqlens.const_data_ptr<int32_t>(), segments, 0};
  check_segments(packed.cu_seqlens, segments, rows);
  Tensor grad_hidden = empty_as(grad, {rows, width});
  if (width == 0) return grad_hidden;  // memory that is not there has no address to copy to
  dispatch_floating(grad.scalar_type(), "segment_pool_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* in = grad.const_data_ptr<T>();
    T* out = grad_hidden.mutable_data_ptr<T>();
    const auto zero_rows = [&](int64_t begin, int64_t end) {
      std::memset(static_cast<void*>(out + begin * width), 0, (end - begin) * width * sizeof(T));
    };
    torch::stable::parallel_for(0, rows, items_per_thread(width), [&](int64_t first, int64_t last) {
      std::vector<T> share(width);  // copied from here: the row above is still on its way to memory
      for (int64_t row = first, segment = packed.segment_of(row); row < last; ++segment) {
        const Rows taken = taken_rows(packed, segment, take);
        const int64_t end = std::min(packed.begin(segment + 1), last);
        const int64_t taken_begin = std::clamp(taken.begin, row, end), taken_end = std::clamp(taken.end, row, end);
        const A count = static_cast<A>(taken.end - taken.begin);
        zero_rows(row, taken_begin);
        if (taken_begin < taken_end)
          for (int64_t e = 0; e < width; ++e)
            share[e] = static_cast<T>(static_cast<A>(in[segment * width + e]) / count);
        for (row = taken_begin; row < taken_end; ++row) std::memcpy(out + row * width, share.data(), width * sizeof(T));
        zero_rows(row, end);
        row = end;
      }
    });
  });
  return grad_hidden;
}

}  // namespace
}  // namespace fastprompt

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) {
  library.impl("segment_pool", TORCH_BOX(&fastprompt::segment_pool));
  library.impl("segment_pool_backward", TORCH_BOX(&fastprompt::segment_pool_backward));
}
