// CUDA's runtime on the CPU, as much of it as csrc/cuda/ uses: a kernel compiled by the C++ compiler runs block after
// block, every thread of a block a fiber.
//
// What it holds kernels to: shared memory begins as NaN and ends at a page that faults; all threads of a block, or of a
// warp, wait at the same place; the room for shared memory that is asked for was granted. A warp runs as far as it can
// before the next one does, the first warp first or the last, in turns from block to block and from launch to launch:
// a barrier that is missing gives results that are wrong, or that differ from run to run.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <unordered_map>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr int kWarpSize = 32;
constexpr size_t kMaxThreads = 1024, kStackBytes = 128 * 1024, kPage = 4096;
constexpr size_t kGrantedBytes = 48 * 1024, kMostBytes = 163 * 1024;  // of shared memory; the most is sm_80's
constexpr size_t kRoomBytes = kWarpSize * 64;

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  State state;
  std::source_location where;  // it waits
  bool started;
  int turn;  // which of the warp's rooms it wrote to last
  ucontext_t beginning;
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;  // of 16 bytes, begun and not yet waited for
};

struct Machine {
  std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
  int count = 0, current = 0;  // threads of the block, and the one that runs
  unsigned launches = 0;
  std::function<void()> kernel;
  std::string failure;
  jmp_buf scheduler;
  alignas(16) char rooms[kMaxThreads / kWarpSize][2][kRoomBytes];  // where lanes show each other values
  char* shared_end;
  size_t shared_bytes = 0;
  std::unordered_map<const void*, size_t> granted;

  Machine() {
    const size_t bytes = (kMostBytes + kPage - 1) / kPage * kPage;
    void* memory = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    shared_end = static_cast<char*>(memory) + bytes;
    mprotect(shared_end, kPage, PROT_NONE);
  }
};
inline Machine machine;

// Of the running thread: let others run until it is ready again.
[[gnu::noinline]] inline void leave() {
  if (_setjmp(machine.threads[machine.current].context) == 0) _longjmp(machine.scheduler, 1);
}

inline void wait(State barrier, const std::source_location& where) {
  Thread& self = machine.threads[machine.current];
  self.state = barrier;
  self.where = where;
  leave();
}

inline void fail(const std::string& what) {
  if (machine.failure.empty()) machine.failure = what;
  leave();  // for good
}

inline void begin_thread() {
  machine.kernel();
  machine.threads[machine.current].state = State::done;
  leave();
}

[[gnu::noinline]] inline void resume(int index) {
  Thread& thread = machine.threads[index];
  machine.current = index;
  threadIdx = dim3(index);
  if (_setjmp(machine.scheduler) != 0) return;
  if (!thread.started) {
    thread.started = true;
    setcontext(&thread.beginning);
  }
  _longjmp(thread.context, 1);
}

// Lets the threads [first, last) pass the barrier if all of them wait at it.
inline bool release(int first, int last, State barrier) {
  const Thread& leader = machine.threads[first];
  for (int i = first; i < last; ++i)
    if (machine.threads[i].state != barrier) return false;
  for (int i = first; i < last; ++i) {
    const std::source_location &here = machine.threads[i].where, &there = leader.where;
    if (here.line() != there.line() || std::strcmp(here.file_name(), there.file_name()) != 0)
      machine.failure = "threads wait at the barriers of lines " + std::to_string(here.line()) + " and " +
                        std::to_string(there.line());
    machine.threads[i].state = State::ready;
  }
  return true;
}

inline void run_warp(int first, bool reversed) {
  do {
    for (int i = 0; i < kWarpSize; ++i) {
      const int index = first + (reversed ? kWarpSize - 1 - i : i);
      if (machine.threads[index].state == State::ready) resume(index);
      if (!machine.failure.empty()) return;
    }
  } while (release(first, first + kWarpSize, State::at_warp_barrier));
}

inline void run_block(bool reversed) {
  for (int i = 0; i < machine.count; ++i) {
    Thread& thread = machine.threads[i];
    thread.state = State::ready;
    thread.started = false;
    thread.turn = 0;
    thread.copies.clear();
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&thread.beginning);
    thread.beginning.uc_stack.ss_sp = thread.stack.get();
    thread.beginning.uc_stack.ss_size = kStackBytes;
    thread.beginning.uc_link = nullptr;
    makecontext(&thread.beginning, begin_thread, 0);
  }
  std::memset(machine.shared_end - machine.shared_bytes, 0xff, machine.shared_bytes);
  const int warps = machine.count / kWarpSize;
  do {
    for (int i = 0; i < warps; ++i) {
      run_warp((reversed ? warps - 1 - i : i) * kWarpSize, reversed);
      if (!machine.failure.empty()) return;
    }
  } while (release(0, machine.count, State::at_block_barrier));
  for (int i = 0; i < machine.count; ++i)
    if (machine.threads[i].state != State::done)
      machine.failure =
          "a thread waits for others that do not come, in line " + std::to_string(machine.threads[i].where.line());
}

inline bool run_grid(dim3 blocks, dim3 threads, size_t shared_bytes, std::function<void()> kernel) {
  ++machine.launches;
  machine.failure.clear();
  machine.kernel = std::move(kernel);
  machine.count = static_cast<int>(threads.x);
  machine.shared_bytes = shared_bytes;
  gridDim = blocks;
  blockDim = threads;
  const unsigned count = blocks.x * blocks.y;
  for (unsigned i = 0; i < count && machine.failure.empty(); ++i) {
    const unsigned block = machine.launches % 2 ? i : count - 1 - i;
    blockIdx = dim3(block % blocks.x, block / blocks.x);
    run_block((block + machine.launches) % 2);
  }
  return machine.failure.empty();
}

// What every lane of the warp passes, by lane.
template <typename T>
const T* exchange(const T& mine, const std::source_location& where) {
  static_assert(sizeof(T) * kWarpSize <= kRoomBytes);
  Thread& self = machine.threads[machine.current];
  self.turn ^= 1;  // nobody is two exchanges behind: two rooms suffice
  T* room = reinterpret_cast<T*>(machine.rooms[machine.current / kWarpSize][self.turn]);
  room[machine.current % kWarpSize] = mine;
  wait(State::at_warp_barrier, where);
  return room;
}

inline void check_shared(const void* pointer) {
  const size_t distance = machine.shared_end - static_cast<const char*>(pointer);
  if (distance < 16 || distance > machine.shared_bytes || reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
    fail("an access of 16 bytes is misaligned, or outside of shared memory");
}

inline void begin_copy(void* to, const void* from) {
  check_shared(to);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a copy is misaligned");
  std::vector<Copy>& copies = machine.threads[machine.current].copies;
  for (const Copy& copy : copies)
    if (copy.to == to) fail("copies collide");
  copies.push_back({to, from});
}

inline void wait_for_copies() {  // they arrive as late as they may
  std::vector<Copy>& copies = machine.threads[machine.current].copies;
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, 16);
  copies.clear();
}

}  // namespace emulator

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  emulator::wait(emulator::State::at_block_barrier, where);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, const std::source_location& where = std::source_location::current()) {
  return emulator::exchange(value, where)[emulator::machine.current % emulator::kWarpSize ^ mask];
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > emulator::kMostBytes) return cudaErrorInvalidValue;
  emulator::machine.granted[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 blocks = config->gridDim, threads = config->blockDim;
  const auto granted = emulator::machine.granted.find(reinterpret_cast<const void*>(kernel));
  const size_t most = granted == emulator::machine.granted.end() ? emulator::kGrantedBytes : granted->second;
  if (blocks.x == 0 || blocks.y == 0 || blocks.z != 1 || threads.x % emulator::kWarpSize != 0 ||
      threads.x > emulator::kMaxThreads || config->dynamicSmemBytes > most || config->dynamicSmemBytes % 16 != 0)
    return cudaErrorInvalidValue;
  const bool fine = emulator::run_grid(blocks, threads, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
}
