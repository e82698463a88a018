// CUDA's runtime for machines without a GPU, as far as csrc/cuda uses it: with this header found
// before CUDA's, a C++ compiler makes host code of the kernels, registered as CPU ops.
//
// Every thread is a fiber, which runs until it waits for others; every warp runs until it waits for
// other warps; blocks run one after another. They go upwards, or downwards where
// STEM_FAST_EMULATE=downwards: different results of the two show a missing barrier. One that some
// threads never reach throws.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One thread runs at a time, so that a variable of it is every fiber's.
#define __shared__ thread_local
#define CUDA CPU  // the dispatch key
#define DeviceGuard NoGuard

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned int x, y; };
struct alignas(16) uint4 { unsigned int x, y, z, w; };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace stem_fast {
inline thread_local __align__(16) char shared_bytes[48 << 10];
}

namespace emulate {

struct Barrier {
  int arrived = 0;
  unsigned int passed = 0;
};
struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];  // values on their way between lanes, in turns
};
struct Fiber {
  ucontext_t context;
  dim3 thread;
  bool done;
  std::vector<char> stack = std::vector<char>(64 << 10);
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current, threads;
inline bool progress;
inline Barrier block;
inline std::vector<Warp> warps;
inline std::function<void()> kernel;

inline void wait(Barrier& barrier, size_t expected) {
  const unsigned int before = barrier.passed;
  if (static_cast<size_t>(++barrier.arrived) == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    progress = true;
  }
  while (barrier.passed == before) swapcontext(&fibers[current].context, &scheduler);
}

inline void start() {
  kernel();
  fibers[current].done = true;
}

inline void run_block(bool downwards) {
  std::memset(stem_fast::shared_bytes, 0xff, sizeof(stem_fast::shared_bytes));  // NaN
  block = {};
  warps.assign((threads + 31) / 32, {});
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
    const unsigned int n = i;
    fiber.thread = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
    fiber.done = false;
  }
  for (size_t left = threads; left;) {
    const size_t before = left;
    bool passed = false;
    for (size_t w = 0; w < warps.size(); ++w) {
      const size_t first = (downwards ? warps.size() - 1 - w : w) * 32;
      const size_t lanes = std::min<size_t>(32, threads - first);
      do {  // a warp runs as far as it can before the next
        progress = false;
        for (size_t i = 0; i < lanes; ++i) {
          current = first + (downwards ? lanes - 1 - i : i);
          if (fibers[current].done) continue;
          threadIdx = fibers[current].thread;
          swapcontext(&scheduler, &fibers[current].context);
          left -= fibers[current].done;
        }
        passed |= progress;
      } while (progress);
    }
    if (left == before && !passed) {
      throw std::runtime_error("emulated kernel: a barrier that some threads don't reach");
    }
  }
}

// The values that the lanes of this warp bring; all 32 must come.
template <typename T>
const uint64_t* exchange(T value) {
  Warp& warp = warps[current / 32];
  uint64_t* slots = warp.slots[warp.barrier.passed % 2];
  std::memcpy(slots + current % 32, &value, sizeof(value));
  wait(warp.barrier, 32);
  return slots;
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::block, emulate::threads); }
inline void __syncwarp() { emulate::exchange(0); }

template <typename T>
T __shfl_xor_sync(unsigned int, T value, int bit) {
  T other;
  std::memcpy(&other, emulate::exchange(value) + (emulate::current % 32 ^ bit), sizeof(other));
  return other;
}

inline unsigned int __ballot_sync(unsigned int, int value) {
  const uint64_t* values = emulate::exchange(uint64_t{value != 0});
  unsigned int bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned int>(values[lane]) << lane;
  return bits;
}

inline int __popc(unsigned int bits) { return __builtin_popcount(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }

template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}

template <typename T>
T atomicMin(T* at, T value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;  // few, so that kernels have to stride
  return cudaSuccess;
}

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 b = config->blockDim, g = config->gridDim;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z, blocks = uint64_t{g.x} * g.y * g.z;
  if (!threads || threads > 1024 || b.z > 64 || !blocks || g.x > INT32_MAX || g.y > 65535 ||
      g.z > 65535 || config->dynamicSmemBytes > sizeof(stem_fast::shared_bytes)) {
    return cudaErrorInvalidConfiguration;
  }
  const char* order = std::getenv("STEM_FAST_EMULATE");
  const bool downwards = order && std::string(order) == "downwards";
  emulate::kernel = [&] { kernel(arguments...); };
  emulate::threads = threads;
  if (emulate::fibers.size() < threads) emulate::fibers.resize(threads);
  blockDim = b;
  gridDim = g;
  for (uint64_t i = 0; i < blocks; ++i) {
    const unsigned int n = downwards ? blocks - 1 - i : i;
    blockIdx = dim3(n % g.x, n / g.x % g.y, n / g.x / g.y);
    emulate::run_block(downwards);
  }
  return cudaSuccess;
}
