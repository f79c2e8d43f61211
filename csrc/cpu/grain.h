// How much work makes a thread worth its start.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastprompt {

constexpr int64_t kGrain = 32768;  // elements

// The least number of items for a thread, each so many elements.
inline int64_t items_per_thread(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

}  // namespace fastprompt
