// Checks of values. They become ValueError and IndexError in Python, which checks the same, but not under
// torch.compile.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/packed_rows.h"

namespace fastprompt {

inline void check_range(const Integers& values, int64_t count, int64_t bound, const char* name) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= bound)
      throw std::out_of_range(std::string(name) + " must be in [0, " + std::to_string(bound) + "), got " +
                              std::to_string(values[i]) + " at index " + std::to_string(i));
}

inline void check_segments(const int32_t* cu_seqlens, int64_t segments, int64_t rows,
                           const std::string& name = "cu_seqlens") {
  const auto got = [](int64_t value) { return ", got " + std::to_string(value); };
  if (cu_seqlens[0] != 0) throw std::invalid_argument(name + " must begin at 0" + got(cu_seqlens[0]));
  if (cu_seqlens[segments] != rows)
    throw std::invalid_argument(name + " must end at " + std::to_string(rows) + ", the number of packed rows" +
                                got(cu_seqlens[segments]));
  for (int64_t b = 0; b < segments; ++b)
    if (cu_seqlens[b + 1] < cu_seqlens[b])
      throw std::invalid_argument(name + " must not decrease" + got(cu_seqlens[b + 1]) + " after " +
                                  std::to_string(cu_seqlens[b]) + " at index " + std::to_string(b + 1));
}

}  // namespace fastprompt
