// Fills a table of functions for one instruction set. The including file gives kVectorBytes and a namespace, below the
// pragma that selects the set.
// clang-format off: in this order
#include "../../common/dropout.h"
#include "../exp2.h"
#include "tiles.h"
#include "blocks.h"
#include "scores.h"
#include "forward.h"
#include "backward.h"
// clang-format on

template <typename T, typename A>
Kernels<T, A> kernels() {
  return {packed_prefix_size<A>,     prefix_sum_size<A>,         segment_sum_size<A>, scratch_size<A>,
          pack_prefix_forward<T, A>, pack_prefix_backward<T, A>, forward<T, A>,       backward<T, A>,
          finish_prefix<T, A>,       finish_segment<T, A>};
}
