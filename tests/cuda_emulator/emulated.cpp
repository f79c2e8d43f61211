// All operators of csrc/cuda/ for tensors on the CPU, in the namespace fastprompt_emulated.
#include <cuda_runtime.h>  // the one beside this file
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cassert>

// What a torch that was built with CUDA exports; linked with -Bsymbolic these come before torch's own.
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_SUCCESS; }
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  if (error == cudaErrorInvalidValue) *message = strdup("invalid launch");
  if (error == cudaErrorLaunchFailure) *message = strdup(emulator::machine.failure.c_str());
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }
}

#define fastprompt fastprompt_emulated
#define CUDA CPU

// In place of the functions of csrc/cuda/prefix_attention/mma.h.
namespace fastprompt::prefix_attention {

using Location = std::source_location;

inline int lane() { return emulator::machine.current % emulator::kWarpSize; }

inline void* shared_memory() { return emulator::machine.shared_end - emulator::machine.shared_bytes; }

inline void begin_copy(void* to, const void* from, bool there) {
  alignas(16) static const char zeros[16] = {};
  emulator::begin_copy(to, there ? from : zeros);
}

inline void wait_for_copies() { emulator::wait_for_copies(); }

using Elements = const uint16_t*;

inline const Elements* exchange_rows(const void* row, const Location& where) {
  emulator::check_shared(row);
  return emulator::exchange(static_cast<Elements>(row), where);
}

inline void load_matrices(uint32_t (&out)[4], const void* row, const Location& where = Location::current()) {
  const Elements* rows = exchange_rows(row, where);
  for (int i = 0; i < 4; ++i) std::memcpy(&out[i], rows[8 * i + lane() / 4] + lane() % 4 * 2, 4);
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row, const Location& where = Location::current()) {
  const Elements* rows = exchange_rows(row, where);
  for (int i = 0; i < 4; ++i) {
    const Elements* first = rows + 8 * i + lane() % 4 * 2;
    out[i] = first[0][lane() / 4] | uint32_t{first[1][lane() / 4]} << 16;
  }
}

template <typename T>
void unpack(float* pair, uint32_t packed) {
  pair[0] = T(static_cast<unsigned short>(packed), T::from_bits());
  pair[1] = T(static_cast<unsigned short>(packed >> 16), T::from_bits());
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const Location& where = Location::current()) {
  struct Operands {
    float a[4][2], b[2][2];
  } mine;
  for (int i = 0; i < 4; ++i) unpack<T>(mine.a[i], a[i]);
  unpack<T>(mine.b[0], b0);
  unpack<T>(mine.b[1], b1);
  const Operands* all = emulator::exchange(mine, where);
  const Operands *row = all + lane() / 4 * 4, *left = all + lane() % 4 * 8, *right = left + 4;
  for (int k = 0; k < 16; ++k) {  // element k is with lane k / 2 % 4 of a row's, or column's, four lanes
    const int half = k / 8, from = k / 2 % 4, i = k % 2;
    const float upper = row[from].a[2 * half][i], lower = row[from].a[2 * half + 1][i];
    c[0] += upper * left[from].b[half][i];
    c[1] += upper * right[from].b[half][i];
    c[2] += lower * left[from].b[half][i];
    c[3] += lower * right[from].b[half][i];
  }
}

template <typename T>
uint32_t pack(float first, float second) {
  return T(first).x | uint32_t{T(second).x} << 16;
}

inline float power_of_two(float exponent) { return std::exp2(exponent); }

}  // namespace fastprompt::prefix_attention

#include "../../csrc/cuda/alignment_loss.cu"
#include "../../csrc/cuda/pack_prompt.cu"
#include "../../csrc/cuda/prefix_attention.cu"
#include "../../csrc/fastprompt.cpp"

// What the emulator must find.
namespace {

using fastprompt::prefix_attention::load_matrices;
using fastprompt::prefix_attention::shared_memory;

void barriers_apart(float*) {
  if (threadIdx.x < 32) __syncthreads();
  __syncthreads();
  if (threadIdx.x >= 32) __syncthreads();
}
void barrier_for_some(float*) {
  if (threadIdx.x < 32) __syncthreads();
}
void row_outside(float*) {
  uint32_t out[4];
  load_matrices(out, static_cast<char*>(shared_memory()) + 16 * threadIdx.x);
}
void copies_collide(float*) {
  for (int i = 0; i < 2; ++i) fastprompt::prefix_attention::begin_copy(shared_memory(), nullptr, false);
}
void no_barrier(float* out) {
  float* shared = static_cast<float*>(shared_memory());
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

torch::stable::Tensor faulty(const torch::stable::Tensor& out, int64_t which, int64_t shared_bytes) {
  void (*const kernels[])(float*) = {barriers_apart, barrier_for_some, row_outside, copies_collide, no_barrier};
  cudaLaunchConfig_t config{dim3(1), dim3(64), static_cast<size_t>(shared_bytes), nullptr};
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernels[which], out.mutable_data_ptr<float>()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, library) {
  library.def("faulty(Tensor(a!) out, int which, int shared_bytes) -> Tensor(a!)");
}
STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, library) { library.impl("faulty", TORCH_BOX(&faulty)); }
