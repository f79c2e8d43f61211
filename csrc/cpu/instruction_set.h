// The instruction set to run with, of those there is code for.
#pragma once

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPROMPT_X86 1
#else
#define FASTPROMPT_X86 0
#endif

namespace fastprompt {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// FASTPROMPT_CPU=portable|avx2|avx512 takes less than the CPU has, for tests and for measuring.
inline InstructionSet instruction_set() {
#if FASTPROMPT_X86
  const char* forced = std::getenv("FASTPROMPT_CPU");
  const std::string limit = forced ? forced : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (limit == "avx512" && avx512) return InstructionSet::kAvx512;
  if (limit != "portable" && avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

}  // namespace fastprompt
