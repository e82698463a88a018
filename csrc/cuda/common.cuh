// What the CUDA kernels share: types, accesses of up to 16 bytes, and launches on PyTorch's stream.
//
// Only PyTorch's stable ABI is used, so that one binary serves every torch >= 2.11. Tests compile
// these files as host C++ too, with tests/emulate/cuda_runtime.h in the place of CUDA's; it knows
// what is used here and no more of CUDA.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "../check.h"

namespace stem_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// What sums of T are kept in.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The register type of one access.
template <int bytes>
struct Access;
template <>
struct Access<2> { using type = unsigned short; };
template <>
struct Access<4> { using type = unsigned int; };
template <>
struct Access<8> { using type = uint2; };
template <>
struct Access<16> { using type = uint4; };

// The values of one access when n are wanted.
template <int n, typename T>
constexpr int kAccess = n * sizeof(T) > 16 ? 16 / sizeof(T) : n;

// n values in accesses as wide as they can be; `from` and `to` are multiples of one.
template <int n, typename T>
__device__ void load(const T* from, T (&to)[n]) {
  using Raw = typename Access<kAccess<n, T> * sizeof(T)>::type;
#pragma unroll
  for (int i = 0; i < n; i += kAccess<n, T>) {
    const Raw raw = *reinterpret_cast<const Raw*>(from + i);
    std::memcpy(to + i, &raw, sizeof(raw));
  }
}

// The same in another type.
template <int n, typename T, typename A>
__device__ void read(const T* from, A (&to)[n]) {
  T values[n];
  load(from, values);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = static_cast<A>(values[i]);
}

template <int n, typename T, typename A>
__device__ void store(const A (&from)[n], T* to) {
  using Raw = typename Access<kAccess<n, T> * sizeof(T)>::type;
#pragma unroll
  for (int i = 0; i < n; i += kAccess<n, T>) {
    T values[kAccess<n, T>];
#pragma unroll
    for (int j = 0; j < kAccess<n, T>; ++j) values[j] = static_cast<T>(from[i + j]);
    Raw raw;
    std::memcpy(&raw, values, sizeof(raw));
    *reinterpret_cast<Raw*>(to + i) = raw;
  }
}

// Shared memory whose size the launch says.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char shared_bytes[];
  return shared_bytes;
}

// Whether `bytes` divides all of the addresses.
inline bool aligned(std::initializer_list<const void*> addresses, size_t bytes) {
  for (const void* address : addresses) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) return false;
  }
  return true;
}

// Calls run(T()) for the type of weights, gradients or expert outputs.
template <typename F>
void for_type(ScalarType type, const char* op, const F& run) {
  switch (type) {
    case ScalarType::Double: return run(double());
    case ScalarType::Float: return run(float());
    case ScalarType::BFloat16: return run(BFloat16());
    case ScalarType::Half: return run(Half());
    default: STEM_FAST_CHECK(false, op, ": the type must be float64, or a 32 or 16 bit float");
  }
}

// A kernel follows pointers on its own device only.
inline void check_device(const char* op, const Tensor& first, const std::vector<Tensor>& others) {
  for (const Tensor& other : others) {
    STEM_FAST_CHECK(other.get_device_index() == first.get_device_index(), op,
                    ": tensors on different devices");
  }
}

// Blocks for `work` pieces of it, as many as keep the device busy; kernels stride over the rest.
inline unsigned int blocks_for(int64_t work, const Tensor& on) {
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, on.get_device_index());
  const int64_t most = int64_t{processors} * 32;  // no device keeps more at once
  return static_cast<unsigned int>(work < most ? work : most);
}

// Launches on the current stream of the device of `on`, which a DeviceGuard has made current.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            const Tensor& on, const Arguments&... arguments) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // else who asks next is told of it again
  STEM_FAST_CHECK(error == cudaSuccess, op, ": the kernel was not launched: ",
                  cudaGetErrorString(error));
}

}  // namespace stem_fast
