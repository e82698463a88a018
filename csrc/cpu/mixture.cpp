// AFTB gated mixture on CPU: softmax and all K mixtures in one read of y; backward in one more read
// of y and one write of dy.
//
//   y      [E, B, H]   float64, float32, bfloat16 or float16; sums are kept in float32 (float64)
//   logits [K, B, E]   same type
//   see, learn         K bit masks over the experts
//   out    [K, B, H]
//
// The mathematics is stem_fast/reference.py's mixture and mixture_backward. Samples are independent,
// so the result is the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "lanes.h"

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxExperts = 64;
constexpr int kMaxGates = 16;
// Gates handled together; y, which a sample's further gates read again, is in the first-level cache.
constexpr int kGateTile = 4;
// Bytes of sums (forward) or gradients (backward) that stay in the first-level cache while one expert
// after the other is read for a block of samples. Sample by sample the experts would be as many
// streams, a power of two apart, that evict each other: half the speed.
constexpr int64_t kBlock = 16384;
constexpr int64_t kMaxSamples = 16;  // of a block
// Values of y a thread handles before another is worth waking.
constexpr int64_t kGrain = 32768;

// Softmax over the experts that are seen; 0 for the others.
template <typename T, typename A = Sum<T>>
INLINE void softmax(const T* logits, int64_t experts, uint64_t see, A* p) {
  A top = -std::numeric_limits<A>::infinity(), total = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (see >> e & 1) top = std::max(top, static_cast<A>(logits[e]));
  }
  for (int64_t e = 0; e < experts; ++e) {
    p[e] = see >> e & 1 ? std::exp(static_cast<A>(logits[e]) - top) : A(0);
    total += p[e];
  }
  for (int64_t e = 0; e < experts; ++e) p[e] /= total;
}

struct Sizes {
  int64_t experts, gates, batch, width;
};

// Adds one sample's y[e], weighed, to the sums of n gates; `first` says whether they start here.
template <int n, typename T, typename A = Sum<T>>
INLINE void mix(const T* y, const A* weight, A* sums, int64_t stride, bool first, const Sizes& s) {
  constexpr int lanes = Lanes<A>::n;
  A w[n];
  for (int i = 0; i < n; ++i) w[i] = weight[i * s.experts];
  int64_t h = 0;
  for (; h + lanes <= s.width; h += lanes) {
    typename Lanes<A>::type value;
    load(y + h, value);
    for (int i = 0; i < n; ++i) {
      typename Lanes<A>::type sum = {};
      if (!first) load(sums + i * stride + h, sum);
      sum += w[i] * value;
      store(sum, sums + i * stride + h);
    }
  }
  for (; h < s.width; ++h) {
    for (int i = 0; i < n; ++i) {
      A* sum = sums + i * stride + h;
      *sum = (first ? A(0) : *sum) + w[i] * static_cast<A>(y[h]);
    }
  }
}

// Calls run(first gate, their number as a constant) for tiles of the gates.
template <typename F>
INLINE void for_gates(int64_t gates, const F& run) {
  int64_t k = 0;
  for (; k + kGateTile <= gates; k += kGateTile) {
    run(k, std::integral_constant<int, kGateTile>());
  }
  switch (gates - k) {
    case 3: return run(k, std::integral_constant<int, 3>());
    case 2: return run(k, std::integral_constant<int, 2>());
    case 1: return run(k, std::integral_constant<int, 1>());
  }
}

int64_t samples_of_a_block(const Sizes& s, size_t size) {
  const int64_t sample = std::max<int64_t>(s.gates * s.width * static_cast<int64_t>(size), 1);
  return std::clamp<int64_t>(kBlock / sample, 1, kMaxSamples);
}

template <typename T, typename A = Sum<T>>
INLINE void forward(const T* y, const T* logits, const uint64_t* see, T* out, const Sizes& s,
                    int64_t begin, int64_t end) {
  const int64_t most = samples_of_a_block(s, sizeof(A)), weights = s.gates * s.experts;
  std::vector<A> p(most * weights);
  std::vector<A> scratch(std::is_same_v<T, A> ? 0 : s.gates * most * s.width);
  for (int64_t b = begin; b < end; b += most) {
    const int64_t samples = std::min(most, end - b);
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = 0; k < s.gates; ++k) {
        softmax(logits + (k * s.batch + b + i) * s.experts, s.experts, see[k],
                p.data() + i * weights + k * s.experts);
      }
    }
    A* sums;
    int64_t stride;  // between the sums of two gates
    if constexpr (std::is_same_v<T, A>) {
      sums = out + b * s.width, stride = s.batch * s.width;
    } else {
      sums = scratch.data(), stride = most * s.width;
    }
    for (int64_t e = 0; e < s.experts; ++e) {
      for (int64_t i = 0; i < samples; ++i) {
        const T* row = y + (e * s.batch + b + i) * s.width;
        const A* weight = p.data() + i * weights + e;
        for_gates(s.gates, [&](int64_t k, auto tile) INLINE_LAMBDA {
          mix<tile()>(row, weight + k * s.experts, sums + k * stride + i * s.width, stride, e == 0,
                      s);
        });
      }
    }
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t k = 0; k < s.gates; ++k) {
        T* to = out + (k * s.batch + b) * s.width;
        for (int64_t h = 0; h < samples * s.width; ++h) to[h] = static_cast<T>(sums[k * stride + h]);
      }
    }
  }
}

// For gates k..k+n and expert e of one sample: dp[k, e], and their part of dy[e]. `first` says
// whether dy[e] starts here, `last` whether it is whole: then it goes past the caches, which the
// experts of a block would fill in vain.
template <int n, typename T, typename A = Sum<T>>
INLINE void unmix(const T* grad, const T* y, const A* taught, A* dp, A* sums, T* dy, bool first,
                  bool last, const Sizes& s) {
  constexpr int lanes = Lanes<A>::n;
  const int64_t stride = s.batch * s.width;
  typename Lanes<A>::type dots[n] = {};
  A tail[n] = {}, weight[n];
  for (int i = 0; i < n; ++i) weight[i] = taught[i * s.experts];
  int64_t h = 0;
  for (; h + lanes <= s.width; h += lanes) {
    typename Lanes<A>::type value, sum = {};
    load(y + h, value);
    if (!first) load(sums + h, sum);
    for (int i = 0; i < n; ++i) {
      typename Lanes<A>::type g;
      load(grad + i * stride + h, g);
      dots[i] += g * value;
      sum += weight[i] * g;
    }
    if (last) {
      stream(sum, dy + h);
    } else {
      store(sum, sums + h);
    }
  }
  for (; h < s.width; ++h) {
    A sum = first ? A(0) : sums[h];
    for (int i = 0; i < n; ++i) {
      const A g = static_cast<A>(grad[i * stride + h]);
      tail[i] += g * static_cast<A>(y[h]);
      sum += weight[i] * g;
    }
    if (last) {
      dy[h] = static_cast<T>(sum);
    } else {
      sums[h] = sum;
    }
  }
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < lanes; ++j) tail[i] += dots[i][j];
    dp[i * s.experts] = tail[i];
  }
}

template <typename T, typename A = Sum<T>>
INLINE void backward(const T* grad, const T* y, const T* logits, const uint64_t* see,
                     const uint64_t* learn, T* dy, T* dlogits, const Sizes& s, int64_t begin,
                     int64_t end) {
  const int64_t most = samples_of_a_block(s, sizeof(T)), weights = s.gates * s.experts;
  std::vector<A> p(most * weights), taught(most * weights), dp(most * weights), sums(s.width);
  for (int64_t b = begin; b < end; b += most) {
    const int64_t samples = std::min(most, end - b);
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = 0; k < s.gates; ++k) {
        const int64_t at = i * weights + k * s.experts;
        softmax(logits + (k * s.batch + b + i) * s.experts, s.experts, see[k], p.data() + at);
        for (int64_t e = 0; e < s.experts; ++e) {
          taught[at + e] = learn[k] >> e & 1 ? p[at + e] : A(0);
        }
      }
    }
    for (int64_t e = 0; e < s.experts; ++e) {
      for (int64_t i = 0; i < samples; ++i) {
        const int64_t row = (e * s.batch + b + i) * s.width, at = i * weights + e;
        for_gates(s.gates, [&](int64_t k, auto tile) INLINE_LAMBDA {
          unmix<tile()>(grad + (k * s.batch + b + i) * s.width, y + row,
                        taught.data() + at + k * s.experts, dp.data() + at + k * s.experts,
                        sums.data(), dy + row, k == 0, k + tile() == s.gates, s);
        });
      }
    }
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = 0; k < s.gates; ++k) {
        const A *row = p.data() + i * weights + k * s.experts, *drow = dp.data() + (row - p.data());
        A dot = 0;
        for (int64_t e = 0; e < s.experts; ++e) dot += row[e] * drow[e];
        T* out = dlogits + (k * s.batch + b + i) * s.experts;
        for (int64_t e = 0; e < s.experts; ++e) out[e] = static_cast<T>(row[e] * (drow[e] - dot));
      }
    }
  }
}

// A template cannot be multiversioned, so each type has its entry.
#define ENTRIES(T)                                                                                \
  MULTIVERSION void forward_entry(const T* y, const T* logits, const uint64_t* see, T* out,       \
                                  const Sizes& s, int64_t begin, int64_t end) {                   \
    forward<T>(y, logits, see, out, s, begin, end);                                               \
  }                                                                                               \
  MULTIVERSION void backward_entry(const T* grad, const T* y, const T* logits,                    \
                                   const uint64_t* see, const uint64_t* learn, T* dy, T* dlogits, \
                                   const Sizes& s, int64_t begin, int64_t end) {                  \
    backward<T>(grad, y, logits, see, learn, dy, dlogits, s, begin, end);                         \
  }
ENTRIES(double)
ENTRIES(float)
ENTRIES(BFloat16)
ENTRIES(Half)

std::vector<uint64_t> bits(const std::vector<int64_t>& masks) {
  return {masks.begin(), masks.end()};
}

Sizes check(const Tensor& y, const Tensor& logits, const std::vector<int64_t>& see,
            const std::vector<int64_t>& learn) {
  STD_TORCH_CHECK(y.dim() == 3 && logits.dim() == 3 && logits.size(1) == y.size(1) &&
                      logits.size(2) == y.size(0),
                  "mixture: y must be [E, B, H] and logits [K, B, E]");
  STD_TORCH_CHECK(y.scalar_type() == logits.scalar_type(),
                  "mixture: y and logits must have the same type");
  const Sizes s{y.size(0), logits.size(0), y.size(1), y.size(2)};
  STD_TORCH_CHECK(s.experts <= kMaxExperts && s.gates <= kMaxGates, "mixture: at most ",
                  kMaxExperts, " experts and ", kMaxGates, " gates");
  const auto gates = static_cast<size_t>(s.gates);
  STD_TORCH_CHECK(see.size() == gates && learn.size() == gates,
                  "mixture: see and learn need a mask for each of ", s.gates, " gates");
  return s;
}

int64_t grain(const Sizes& s) { return kGrain / std::max<int64_t>(s.experts * s.width, 1) + 1; }

Tensor mixture(const Tensor& y_in, const Tensor& logits_in, const std::vector<int64_t>& see_in,
               const std::vector<int64_t>& learn_in) {
  const Sizes s = check(y_in, logits_in, see_in, learn_in);
  const Tensor y = torch::stable::contiguous(y_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  const auto see = bits(see_in);
  Tensor out = empty_kept(y, {s.gates, s.batch, s.width});
  for_type(y.scalar_type(), "mixture", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, s.batch, grain(s), [&](int64_t begin, int64_t end) {
      forward_entry(static_cast<const T*>(y.const_data_ptr()),
          static_cast<const T*>(logits.const_data_ptr()), see.data(),
          static_cast<T*>(out.mutable_data_ptr()), s, begin, end);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> mixture_backward(const Tensor& grad_in, const Tensor& y_in,
                                            const Tensor& logits_in,
                                            const std::vector<int64_t>& see_in,
                                            const std::vector<int64_t>& learn_in) {
  const Sizes s = check(y_in, logits_in, see_in, learn_in);
  STD_TORCH_CHECK(grad_in.dim() == 3 && grad_in.size(0) == s.gates &&
                      grad_in.size(1) == s.batch && grad_in.size(2) == s.width &&
                      grad_in.scalar_type() == y_in.scalar_type(),
                  "mixture: the gradient must be [K, B, H] of y's type");
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor y = torch::stable::contiguous(y_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  const auto see = bits(see_in), learn = bits(learn_in);
  Tensor dy = empty_kept(y, {s.experts, s.batch, s.width});
  Tensor dlogits = empty_kept(logits, {s.gates, s.batch, s.experts});
  for_type(y.scalar_type(), "mixture", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, s.batch, grain(s), [&](int64_t begin, int64_t end) {
      backward_entry(static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(y.const_data_ptr()),
          static_cast<const T*>(logits.const_data_ptr()), see.data(), learn.data(),
          static_cast<T*>(dy.mutable_data_ptr()), static_cast<T*>(dlogits.mutable_data_ptr()),
          s, begin, end);
    });
  });
  return {dy, dlogits};
}

}  // namespace

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("mixture", TORCH_BOX(&mixture));
  m.impl("mixture_backward", TORCH_BOX(&mixture_backward));
}
