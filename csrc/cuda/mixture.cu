// AFTB gated mixture on CUDA: softmax and all K mixtures in one read of y; backward in one more
// read of y and one write of dy.
//
//   y      [E, B, H]   float64, float32, bfloat16 or float16; sums are kept in float32 (float64)
//   logits [K, B, E]   same type
//   see, learn         K bit masks over the experts
//   out    [K, B, H]
//
// The mathematics is in stem_fast/reference/mixture.py. A sample is summed by the same threads
// in the same order whatever the grid, so results repeat bit for bit.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common.cuh"

namespace stem_fast {
namespace {

constexpr int kMaxExperts = 64;
constexpr int kMaxGates = 16;
constexpr unsigned int kAll = 0xffffffff;
// Lanes that share one softmax: four of them at once in a warp, for few experts and several gates.
constexpr int kGroup = 8;
constexpr int kForwardThreads = 256;
constexpr int kBackwardThreads = 128;
// Of a multiprocessor; where 0 leaves that to nvcc, others spill, see lookup.cu.
template <typename T>
constexpr int kBackwardBlocks = sizeof(T) == 8 ? 3 : sizeof(T) == 2 ? 4 : 0;
// Of one block, the most that needs no permission.
constexpr int64_t kSharedBytes = 48 << 10;

template <typename T>
struct Mixture {
  const T *y, *logits, *grad;
  T *out, *dy, *dlogits;
  int64_t batch, width;
  int experts, gates;
  int tile;    // samples of a block, in the forward
  int stride;  // values in shared memory: of a sample in the forward, of one table in the backward
  bool relu;   // whether dy is zero where y <= 0
  uint64_t see[kMaxGates], learn[kMaxGates];
};

template <typename A>
__device__ A group_sum(A value) {
#pragma unroll
  for (int bit = kGroup / 2; bit; bit /= 2) value += __shfl_xor_sync(kAll, value, bit);
  return value;
}

template <typename A>
__device__ A group_max(A value) {
#pragma unroll
  for (int bit = kGroup / 2; bit; bit /= 2) {
    const A other = __shfl_xor_sync(kAll, value, bit);
    value = value < other ? other : value;
  }
  return value;
}

// p[e * kGates] = softmax over the experts that are seen, 0 for the others, by the lanes of a
// group. All lanes of the warp come here; one that has no gate brings experts = 0.
template <int kGates, typename T, typename A>
__device__ void softmax(const T* logits, uint64_t see, int experts, A* p) {
  constexpr A kLeast = -static_cast<A>(INFINITY);
  const int lane = threadIdx.x % kGroup;
  A top = kLeast, total = 0;
  for (int e = lane; e < experts; e += kGroup) {
    const A logit = see >> e & 1 ? static_cast<A>(logits[e]) : kLeast;
    top = top < logit ? logit : top;
  }
  top = group_max(top);
  for (int e = lane; e < experts; e += kGroup) {
    const A value = see >> e & 1 ? std::exp(static_cast<A>(logits[e]) - top) : A(0);
    p[e * kGates] = value;
    total += value;
  }
  total = group_sum(total);
  for (int e = lane; e < experts; e += kGroup) {
    if (see >> e & 1) p[e * kGates] /= total;
  }
}

// A block takes `tile` samples at a time: first their weights p[sample][e][kGates], in shared
// memory, then a thread sums all gates of n neighbouring values.
template <typename T, int kGates, int n>
__global__ void __launch_bounds__(kForwardThreads)
    mixture_kernel(const __grid_constant__ Mixture<T> a) {
  using A = Sum<T>;
  constexpr int kAhead = 4;  // experts whose values are loaded together
  A* p = reinterpret_cast<A*>(dynamic_shared());
  const int64_t plane = a.batch * a.width;
  const unsigned int columns = a.width / n;
  for (int64_t first = int64_t{blockIdx.x} * a.tile; first < a.batch;
       first += int64_t{gridDim.x} * a.tile) {
    const int samples = a.batch - first < a.tile ? a.batch - first : a.tile;
    const int pairs = samples * kGates, groups = kForwardThreads / kGroup;
    for (int base = 0; base < pairs; base += groups) {
      const int pair = base + threadIdx.x / kGroup, sample = pair / kGates, k = pair % kGates;
      A* to = p + sample * a.stride + k;
      if (pair < pairs && k >= a.gates) {  // a gate that is not there adds nothing
        for (int e = threadIdx.x % kGroup; e < a.experts; e += kGroup) to[e * kGates] = 0;
      }
      const bool real = pair < pairs && k < a.gates;
      const int gate = real ? k : 0;
      const T* logits = a.logits + (gate * a.batch + first + (real ? sample : 0)) * a.experts;
      softmax<kGates>(logits, a.see[gate], real ? a.experts : 0, to);
    }
    __syncthreads();
    for (unsigned int i = threadIdx.x; i < samples * columns; i += kForwardThreads) {
      const A* weights = p + i / columns * a.stride;
      const int64_t at = first * a.width + int64_t{i} * n;
      A sums[kGates][n] = {};
      for (int e = 0; e < a.experts; e += kAhead) {
        T values[kAhead][n];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (e + j < a.experts) load(a.y + (e + j) * plane + at, values[j]);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (e + j >= a.experts) continue;
          A weight[kGates];
          load(weights + (e + j) * kGates, weight);
#pragma unroll
          for (int k = 0; k < kGates; ++k) {
#pragma unroll
            for (int h = 0; h < n; ++h) sums[k][h] += weight[k] * static_cast<A>(values[j][h]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kGates; ++k) {
        if (k < a.gates) store(sums[k], a.out + k * plane + at);
      }
    }
    __syncthreads();
  }
}

// Sums 16 values over the lanes of a warp in 16 exchanges instead of 80: each halves the values
// that a lane is to sum. The sum of value number lane / 2 ends in values[0]. A template, because
// nvcc did not always unroll the loop, and then kept the values in local memory.
template <int count = 16, typename A>
__device__ void reduce_warp(A (&values)[16], int lane) {
  if constexpr (count == 1) {
    values[0] += __shfl_xor_sync(kAll, values[0], 1);
  } else {
    const bool upper = lane & count;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const A kept = upper ? values[i + count / 2] : values[i];
      const A given = upper ? values[i] : values[i + count / 2];
      values[i] = kept + __shfl_xor_sync(kAll, given, count);
    }
    reduce_warp<count / 2>(values, lane);
  }
}

// A warp takes a sample: softmax; then, for 32 * n values at a time, the gradients of all gates in
// registers and the experts one after another; then the softmax backward. Its tables in shared
// memory are [e][kGates], and their experts a multiple of those taken together.
template <typename T, int kGates, int n>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<T>)
    mixture_backward_kernel(const __grid_constant__ Mixture<T> a) {
  using A = Sum<T>;
  constexpr int kAhead = 16 / kGates;  // experts whose values are loaded together
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  A* p = reinterpret_cast<A*>(dynamic_shared()) + warp * 3 * a.stride;
  A *taught = p + a.stride, *dp = taught + a.stride;
  const int64_t plane = a.batch * a.width;
  for (int64_t b = int64_t{blockIdx.x} * warps + warp; b < a.batch;
       b += int64_t{gridDim.x} * warps) {
    for (int base = 0; base < kGates; base += 32 / kGroup) {
      const int k = base + lane / kGroup;
      const bool real = k < a.gates;
      const int gate = real ? k : 0;
      softmax<kGates>(a.logits + (gate * a.batch + b) * a.experts, a.see[gate],
                      real ? a.experts : 0, p + k);
      for (int e = lane % kGroup; e < a.experts; e += kGroup) {
        taught[e * kGates + k] = real && a.learn[gate] >> e & 1 ? p[e * kGates + k] : A(0);
      }
    }
    for (int i = lane; i < a.stride; i += 32) dp[i] = 0;
    __syncwarp();
    for (int64_t start = 0; start < a.width; start += 32 * n) {
      const int64_t h = start + lane * n;
      const bool inside = h < a.width;
      const int64_t at = b * a.width + h;
      T grad[kGates][n] = {};
#pragma unroll
      for (int k = 0; k < kGates; ++k) {
        if (inside && k < a.gates) load(a.grad + k * plane + at, grad[k]);
      }
      for (int e = 0; e < a.experts; e += kAhead) {
        T values[kAhead][n] = {};
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (inside && e + j < a.experts) load(a.y + (e + j) * plane + at, values[j]);
        }
        A dots[16] = {};
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (e + j >= a.experts) continue;
          A weight[kGates], sums[n] = {};
          load(taught + (e + j) * kGates, weight);
#pragma unroll
          for (int k = 0; k < kGates; ++k) {
#pragma unroll
            for (int i = 0; i < n; ++i) {
              const A g = static_cast<A>(grad[k][i]);
              dots[j * kGates + k] += g * static_cast<A>(values[j][i]);
              sums[i] += weight[k] * g;
            }
          }
          if (a.relu) {
#pragma unroll
            for (int i = 0; i < n; ++i) {
              if (static_cast<A>(values[j][i]) <= 0) sums[i] = 0;
            }
          }
          if (inside) store(sums, a.dy + (e + j) * plane + at);
        }
        reduce_warp(dots, lane);
        if (lane % 2 == 0) dp[e * kGates + lane / 2] += dots[0];
      }
    }
    __syncwarp();
    for (int base = 0; base < kGates; base += 32 / kGroup) {
      const int k = base + lane / kGroup, experts = k < a.gates ? a.experts : 0;
      A mean = 0;
      for (int e = lane % kGroup; e < experts; e += kGroup) {
        mean += p[e * kGates + k] * dp[e * kGates + k];
      }
      mean = group_sum(mean);
      T* to = a.dlogits + (k * a.batch + b) * a.experts;
      for (int e = lane % kGroup; e < experts; e += kGroup) {
        to[e] = static_cast<T>(p[e * kGates + k] * (dp[e * kGates + k] - mean));
      }
    }
    __syncwarp();
  }
}

template <int n>
using Constant = std::integral_constant<int, n>;

// Calls run(gates, n) with the number of gates that a kernel is made for, and the values a thread
// takes at once: 16 bytes if they and the gates' sums fit into registers and if a row of `width` is
// then still wide enough for `lanes` threads; else 4 bytes, or a single value.
template <typename T, typename F>
void for_shape(int64_t gates, int64_t width, bool is_aligned, int64_t lanes, const F& run) {
  const auto sized = [&](auto k) {
    constexpr int kWidest = std::min<int>(16 / sizeof(T), 32 / k);
    constexpr int kNarrow = std::max<int>(1, 4 / sizeof(T));
    if (is_aligned && width % kWidest == 0 && width >= kWidest * lanes) {
      run(k, Constant<kWidest>());
    } else if (is_aligned && width % kNarrow == 0) {
      run(k, Constant<kNarrow>());
    } else {
      run(k, Constant<1>());
    }
  };
  if (gates <= 4) return sized(Constant<4>());
  if (gates <= 8) return sized(Constant<8>());
  return sized(Constant<16>());
}

// Types and sizes, checked; pointers into contiguous tensors, and the masks.
template <typename T>
Mixture<T> arguments(const Tensor& y, const Tensor& logits, const std::vector<int64_t>& see,
                     const std::vector<int64_t>& learn) {
  Mixture<T> a{};
  a.y = static_cast<const T*>(y.const_data_ptr());
  a.logits = static_cast<const T*>(logits.const_data_ptr());
  a.batch = y.size(1);
  a.width = y.size(2);
  a.experts = static_cast<int>(y.size(0));
  a.gates = static_cast<int>(logits.size(0));
  std::copy(see.begin(), see.end(), a.see);
  std::copy(learn.begin(), learn.end(), a.learn);
  return a;
}

void check(const Tensor& y, const Tensor& logits, const std::vector<int64_t>& see,
           const std::vector<int64_t>& learn) {
  STEM_FAST_CHECK(y.dim() == 3 && logits.dim() == 3 && logits.size(1) == y.size(1) &&
                      logits.size(2) == y.size(0),
                  "mixture: y must be [E, B, H] and logits [K, B, E]");
  STEM_FAST_CHECK(y.scalar_type() == logits.scalar_type(),
                  "mixture: y and logits must have the same type");
  const int64_t gates = logits.size(0);
  STEM_FAST_CHECK(y.size(0) <= kMaxExperts && gates <= kMaxGates, "mixture: at most ", kMaxExperts,
                  " experts and ", kMaxGates, " gates");
  const auto masks = static_cast<size_t>(gates);
  STEM_FAST_CHECK(see.size() == masks && learn.size() == masks,
                  "mixture: see and learn need a mask for each of ", gates, " gates");
  STEM_FAST_CHECK(y.size(2) <= INT32_MAX, "mixture: experts are too wide");
}

Tensor mixture(const Tensor& y_in, const Tensor& logits_in, const std::vector<int64_t>& see,
               const std::vector<int64_t>& learn) {
  check(y_in, logits_in, see, learn);
  check_device("mixture", y_in, {logits_in});
  const DeviceGuard guard(y_in.get_device_index());
  const Tensor y = torch::stable::contiguous(y_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor out = torch::stable::new_empty(y, {logits.size(0), y.size(1), y.size(2)});
  if (out.numel() == 0) return out;
  for_type(y.scalar_type(), "mixture", [&](auto zero) {
    using T = decltype(zero);
    using A = Sum<T>;
    auto a = arguments<T>(y, logits, see, learn);
    a.out = static_cast<T*>(out.mutable_data_ptr());
    for_shape<T>(a.gates, a.width, aligned({a.y, a.out}, 16), 1, [&](auto k, auto n) {
      // Every thread once; the 16 bytes between samples keep them in different banks.
      const int64_t wanted = (kForwardThreads * n() + a.width - 1) / a.width;
      a.stride = a.experts * k() + 16 / sizeof(A);
      const int64_t most = kSharedBytes / static_cast<int64_t>(a.stride * sizeof(A));
      a.tile = static_cast<int>(std::min({wanted, most, a.batch}));
      const dim3 grid(blocks_for((a.batch + a.tile - 1) / a.tile, y));
      launch("mixture", mixture_kernel<T, k(), n()>, grid, dim3(kForwardThreads),
             a.tile * a.stride * sizeof(A), y, a);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> mixture_backward(const Tensor& grad_in, const Tensor& y_in,
                                            const Tensor& logits_in,
                                            const std::vector<int64_t>& see,
                                            const std::vector<int64_t>& learn, bool relu) {
  check(y_in, logits_in, see, learn);
  STEM_FAST_CHECK(grad_in.dim() == 3 && grad_in.size(0) == logits_in.size(0) &&
                      grad_in.size(1) == y_in.size(1) && grad_in.size(2) == y_in.size(2) &&
                      grad_in.scalar_type() == y_in.scalar_type(),
                  "mixture: the gradient must be [K, B, H] of y's type");
  check_device("mixture", y_in, {grad_in, logits_in});
  const DeviceGuard guard(y_in.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor y = torch::stable::contiguous(y_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  Tensor dy = torch::stable::new_empty(y, {y.size(0), y.size(1), y.size(2)});
  Tensor dlogits = torch::stable::new_empty(logits, {logits.size(0), y.size(1), y.size(0)});
  if (dy.numel() == 0 && dlogits.numel() == 0) return {dy, dlogits};
  for_type(y.scalar_type(), "mixture", [&](auto zero) {
    using T = decltype(zero);
    using A = Sum<T>;
    auto a = arguments<T>(y, logits, see, learn);
    a.grad = static_cast<const T*>(grad.const_data_ptr());
    a.relu = relu;
    a.dy = static_cast<T*>(dy.mutable_data_ptr());
    a.dlogits = static_cast<T*>(dlogits.mutable_data_ptr());
    for_shape<T>(a.gates, a.width, aligned({a.y, a.grad, a.dy}, 16), 32, [&](auto k, auto n) {
      constexpr int kAhead = 16 / k();
      a.stride = (a.experts + kAhead - 1) / kAhead * kAhead * k();
      const int64_t bytes = 3 * a.stride * sizeof(A);  // of a warp
      const int64_t warps = std::min<int64_t>(kBackwardThreads / 32, kSharedBytes / bytes);
      const dim3 grid(blocks_for((a.batch + warps - 1) / warps, y));
      launch("mixture", mixture_backward_kernel<T, k(), n()>, grid, dim3(warps * 32), warps * bytes,
             y, a);
    });
  });
  return {dy, dlogits};
}

}  // namespace
}  // namespace stem_fast

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CUDA, m) {
  m.impl("mixture", TORCH_BOX(&stem_fast::mixture));
  m.impl("mixture_backward", TORCH_BOX(&stem_fast::mixture_backward));
}
