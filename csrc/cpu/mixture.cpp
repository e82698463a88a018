// AFTB gated mixture on CPU: softmax and all K mixtures in one read of y; backward in one more read
// of y and one write of dy.
//
//   y      [E, B, H]   float64, float32, bfloat16 or float16; sums are kept in float32 (float64)
//   logits [K, B, E]   same type
//   see, learn         K bit masks over the experts
//   out    [K, B, H]
//
// The mathematics is in stem_fast/reference/mixture.py. Samples are independent, so the result is
// the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
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
// Bytes of sums (forward) or gradients (backward) that stay in the second-level cache while one
// expert after the other is read for a block of samples. Sample by sample the experts would be as
// many streams, a power of two apart, that evict each other: half the speed. What a block reads next
// of the next expert is fetched ahead, for hardware sees no stream there: a third of the time.
constexpr int64_t kBlock = 65536;
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
  // Between two experts of y, two gates of logits and of the gradient: all may be parts of a batch.
  int64_t y_stride, logits_stride, grad_stride;
};

// Adds one sample's y[e], weighed, to the sums of n gates; `first` says whether they start here.
// `ahead` is what is read after this block of the expert: another expert's, far away in memory.
template <int n, typename T, typename A = Sum<T>>
INLINE void mix(const T* y, const T* ahead, const A* weight, A* sums, int64_t stride, bool first,
                const Sizes& s) {
  constexpr int lanes = Lanes<A>::n;
  A w[n];
  for (int i = 0; i < n; ++i) w[i] = weight[i * s.experts];
  int64_t h = 0;
  for (; h + lanes <= s.width; h += lanes) {
    typename Lanes<A>::type value;
    load(y + h, value);
    __builtin_prefetch(ahead + h);
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
        softmax(logits + k * s.logits_stride + (b + i) * s.experts, s.experts, see[k],
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
        const T* row = y + e * s.y_stride + (b + i) * s.width;
        const T* ahead = e + 1 < s.experts ? row + s.y_stride : y + (b + most + i) * s.width;
        const A* weight = p.data() + i * weights + e;
        for_gates(s.gates, [&](int64_t k, auto tile) INLINE_LAMBDA {
          mix<tile()>(row, ahead, weight + k * s.experts, sums + k * stride + i * s.width, stride,
                      e == 0, s);
        });
      }
    }
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t k = 0; k < s.gates; ++k) {
        T* to = out + (k * s.batch + b) * s.width;
        const A* from = sums + k * stride;
        const int64_t n = samples * s.width;
        int64_t h = 0;
        for (; h + Lanes<A>::n <= n; h += Lanes<A>::n) {
          typename Lanes<A>::type sum;
          load(from + h, sum);
          store(sum, to + h);
        }
        for (; h < n; ++h) to[h] = static_cast<T>(from[h]);
      }
    }
  }
}

// For n gates and one expert of one sample: dp[k, e], and their part of dy[e]. Gates are `step`
// apart in taught and dp. `first` says whether dy[e] starts here, `last` whether it is whole: then it
// goes past the caches, which the experts of a block would fill in vain; with `relu` it is zero where
// y <= 0. `ahead` as in mix.
template <int n, typename T, typename A = Sum<T>>
INLINE void unmix(const T* const* grad, const T* y, const T* ahead, const A* taught, A* dp,
                  int64_t step, A* sums, T* dy, bool first, bool last, bool relu, int64_t width) {
  constexpr int lanes = Lanes<A>::n;
  typename Lanes<A>::type dots[n] = {};
  A tail[n] = {}, weight[n];
  for (int i = 0; i < n; ++i) weight[i] = taught[i * step];
  int64_t h = 0;
  for (; h + lanes <= width; h += lanes) {
    typename Lanes<A>::type value, sum = {};
    load(y + h, value);
    __builtin_prefetch(ahead + h);
    if (!first) load(sums + h, sum);
    for (int i = 0; i < n; ++i) {
      typename Lanes<A>::type g;
      load(grad[i] + h, g);
      dots[i] += g * value;
      sum += weight[i] * g;
    }
    if (last) {
      if (relu) sum = value <= 0 ? typename Lanes<A>::type{} : sum;
      stream(sum, dy + h);
    } else {
      store(sum, sums + h);
    }
  }
  for (; h < width; ++h) {
    A sum = first ? A(0) : sums[h];
    for (int i = 0; i < n; ++i) {
      const A g = static_cast<A>(grad[i][h]);
      tail[i] += g * static_cast<A>(y[h]);
      sum += weight[i] * g;
    }
    if (last) {
      dy[h] = static_cast<T>(relu && static_cast<A>(y[h]) <= 0 ? A(0) : sum);
    } else {
      sums[h] = sum;
    }
  }
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < lanes; ++j) tail[i] += dots[i][j];
    dp[i * step] = tail[i];
  }
}

template <typename T, typename A = Sum<T>>
INLINE void backward(const T* grad, const T* y, const T* logits, const uint64_t* see,
                     const uint64_t* learn, bool relu, T* dy, T* dlogits, const Sizes& s,
                     int64_t begin, int64_t end) {
  const int64_t most = samples_of_a_block(s, sizeof(T)), weights = s.gates * s.experts;
  std::vector<A> p(most * weights), taught(most * weights), dp(most * weights), sums(s.width);
  for (int64_t b = begin; b < end; b += most) {
    const int64_t samples = std::min(most, end - b);
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = 0; k < s.gates; ++k) {
        const int64_t at = i * weights + k * s.experts;
        softmax(logits + k * s.logits_stride + (b + i) * s.experts, s.experts, see[k], p.data() + at);
        for (int64_t e = 0; e < s.experts; ++e) {
          taught[at + e] = learn[k] >> e & 1 ? p[at + e] : A(0);
        }
      }
    }
    for (int64_t e = 0; e < s.experts; ++e) {
      for (int64_t i = 0; i < samples; ++i) {
        const int64_t at = i * weights + e, sample = (b + i) * s.width;
        const T* row = y + e * s.y_stride + sample;
        const T* ahead = e + 1 < s.experts ? row + s.y_stride : y + sample + most * s.width;
        const T* rows[kMaxGates];
        for (int64_t k = 0; k < s.gates; ++k) rows[k] = grad + k * s.grad_stride + sample;
        for_gates(s.gates, [&](int64_t k, auto tile) INLINE_LAMBDA {
          const int64_t first = at + k * s.experts;
          unmix<tile()>(rows + k, row, ahead, taught.data() + first, dp.data() + first, s.experts,
                        sums.data(), dy + e * s.batch * s.width + sample, k == 0,
                        k + tile() == s.gates, relu, s.width);
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
  fence();
}

// The backward pass of expert e alone, from the weights p [K, B, E]: dy [B, H] and dp [K, B].
template <typename T, typename A = Sum<T>>
INLINE void expert_backward(const T* const* grads, const T* y, const A* p, const uint64_t* learn,
                            int64_t e, T* dy, A* dp, const Sizes& s, int64_t begin, int64_t end) {
  std::vector<A> sums(s.width);
  for (int64_t b = begin; b < end; ++b) {
    A taught[kMaxGates], dots[kMaxGates];
    const T* rows[kMaxGates];
    for (int64_t k = 0; k < s.gates; ++k) {
      taught[k] = learn[k] >> e & 1 ? p[(k * s.batch + b) * s.experts + e] : A(0);
      rows[k] = grads[k] + b * s.width;
    }
    for_gates(s.gates, [&](int64_t k, auto tile) INLINE_LAMBDA {
      unmix<tile()>(rows + k, y + b * s.width, y + (b + 1) * s.width, taught + k, dots + k, 1,
                    sums.data(), dy + b * s.width, k == 0, k + tile() == s.gates, false, s.width);
    });
    for (int64_t k = 0; k < s.gates; ++k) dp[k * s.batch + b] = dots[k];
  }
  fence();
}

// A template cannot be multiversioned, so each type has its entry.
#define ENTRIES(T)                                                                                \
  MULTIVERSION void forward_entry(const T* y, const T* logits, const uint64_t* see, T* out,       \
                                  const Sizes& s, int64_t begin, int64_t end) {                   \
    forward<T>(y, logits, see, out, s, begin, end);                                               \
  }                                                                                               \
  MULTIVERSION void backward_entry(const T* grad, const T* y, const T* logits,                    \
                                   const uint64_t* see, const uint64_t* learn, bool relu, T* dy,  \
                                   T* dlogits, const Sizes& s, int64_t begin, int64_t end) {      \
    backward<T>(grad, y, logits, see, learn, relu, dy, dlogits, s, begin, end);                   \
  }                                                                                               \
  MULTIVERSION void expert_entry(const T* const* grads, const T* y, const Sum<T>* p,              \
                                 const uint64_t* learn, int64_t e, T* dy, Sum<T>* dp,             \
                                 const Sizes& s, int64_t begin, int64_t end) {                    \
    expert_backward<T>(grads, y, p, learn, e, dy, dp, s, begin, end);                             \
  }
ENTRIES(double)
ENTRIES(float)
ENTRIES(BFloat16)
ENTRIES(Half)

std::vector<uint64_t> bits(const std::vector<int64_t>& masks) {
  return {masks.begin(), masks.end()};
}

// Itself where each plane [B, n] is contiguous, else a copy.
Tensor planes(const Tensor& t) {
  STEM_FAST_CHECK(t.dim() == 3,
                  "mixture: expected y [E, B, H], logits [K, B, E] and the gradient [K, B, H], got a "
                  "tensor of ", t.dim(), " dimensions");
  const bool whole = t.stride(2) == 1 && t.stride(1) == t.size(2);
  return whole ? t : torch::stable::contiguous(t);
}

Sizes check(const Tensor& y, const Tensor& logits, const std::vector<int64_t>& see,
            const std::vector<int64_t>& learn) {
  STEM_FAST_CHECK(logits.size(1) == y.size(1) && logits.size(2) == y.size(0),
                  "mixture: y must be [E, B, H] and logits [K, B, E]");
  STEM_FAST_CHECK(y.scalar_type() == logits.scalar_type(),
                  "mixture: y and logits must have the same type");
  const Sizes s{y.size(0), logits.size(0), y.size(1), y.size(2), y.stride(0), logits.stride(0), 0};
  STEM_FAST_CHECK(s.experts > 0 && s.experts <= kMaxExperts && s.gates > 0 && s.gates <= kMaxGates,
                  "mixture: 1 to ", kMaxExperts, " experts and 1 to ", kMaxGates, " gates");
  const auto gates = static_cast<size_t>(s.gates);
  STEM_FAST_CHECK(see.size() == gates && learn.size() == gates,
                  "mixture: see and learn need a mask for each of ", s.gates, " gates");
  return s;
}

int64_t grain(const Sizes& s) { return kGrain / std::max<int64_t>(s.experts * s.width, 1) + 1; }

Tensor mixture(const Tensor& y_in, const Tensor& logits_in, const std::vector<int64_t>& see_in,
               const std::vector<int64_t>& learn_in) {
  const Tensor y = planes(y_in), logits = planes(logits_in);
  const Sizes s = check(y, logits, see_in, learn_in);
  const auto see = bits(see_in);
  Tensor out = empty_kept(y, {s.gates, s.batch, s.width}, kOutput);
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
                                            const std::vector<int64_t>& learn_in, bool relu) {
  const Tensor grad = planes(grad_in), y = planes(y_in), logits = planes(logits_in);
  Sizes s = check(y, logits, see_in, learn_in);
  STEM_FAST_CHECK(grad.size(0) == s.gates && grad.size(1) == s.batch && grad.size(2) == s.width &&
                      grad.scalar_type() == y.scalar_type(),
                  "mixture: the gradient must be [K, B, H] of y's type");
  s.grad_stride = grad.stride(0);
  const auto see = bits(see_in), learn = bits(learn_in);
  Tensor dy = empty_kept(y, {s.experts, s.batch, s.width}, kScratch);
  Tensor dlogits = empty_kept(logits, {s.gates, s.batch, s.experts}, kScratch);
  for_type(y.scalar_type(), "mixture", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, s.batch, grain(s), [&](int64_t begin, int64_t end) {
      backward_entry(static_cast<const T*>(grad.const_data_ptr()),
                     static_cast<const T*>(y.const_data_ptr()),
                     static_cast<const T*>(logits.const_data_ptr()), see.data(), learn.data(), relu,
                     static_cast<T*>(dy.mutable_data_ptr()),
                     static_cast<T*>(dlogits.mutable_data_ptr()), s, begin, end);
    });
  });
  return {dy, dlogits};
}

std::tuple<Tensor, Tensor> mixture_expert_backward(const std::vector<Tensor>& grads_in,
                                                   const Tensor& y_in, const Tensor& p_in,
                                                   const std::vector<int64_t>& learn_in,
                                                   int64_t e) {
  const Tensor y = torch::stable::contiguous(y_in), p = torch::stable::contiguous(p_in);
  STEM_FAST_CHECK(y.dim() == 2 && p.dim() == 3 && p.size(1) == y.size(0) && e >= 0 &&
                      e < p.size(2) && p.size(2) <= kMaxExperts && p.size(0) <= kMaxGates &&
                      static_cast<int64_t>(grads_in.size()) == p.size(0) &&
                      learn_in.size() == grads_in.size(),
                  "mixture: y must be [B, H], p [K, B, E], with K gradients and masks, and e < E");
  const Sizes s{p.size(2), p.size(0), y.size(0), y.size(1), 0, 0, 0};
  std::vector<Tensor> grads;
  for (const Tensor& grad : grads_in) {
    STEM_FAST_CHECK(grad.dim() == 2 && grad.size(0) == s.batch && grad.size(1) == s.width &&
                        grad.scalar_type() == y.scalar_type(),
                    "mixture: each gradient must be [B, H] of y's type");
    grads.push_back(torch::stable::contiguous(grad));
  }
  const auto learn = bits(learn_in);
  Tensor dy = empty_kept(y, {s.batch, s.width}, kOutput);
  Tensor dp = torch::stable::new_empty(p, {s.gates, s.batch});
  for_type(y.scalar_type(), "mixture", [&](auto zero) {
    using T = decltype(zero);
    const ScalarType sum = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    STEM_FAST_CHECK(p.scalar_type() == sum, "mixture: p must be float32, for float64 y float64");
    const T* pointers[kMaxGates];
    for (int64_t k = 0; k < s.gates; ++k) {
      pointers[k] = static_cast<const T*>(grads[k].const_data_ptr());
    }
    const int64_t grain = kGrain / std::max<int64_t>(s.width, 1) + 1;
    torch::stable::parallel_for(0, s.batch, grain, [&](int64_t begin, int64_t end) {
      expert_entry(pointers, static_cast<const T*>(y.const_data_ptr()),
                   static_cast<const Sum<T>*>(p.const_data_ptr()), learn.data(), e,
                   static_cast<T*>(dy.mutable_data_ptr()),
                   static_cast<Sum<T>*>(dp.mutable_data_ptr()), s, begin, end);
    });
  });
  return {dy, dp};
}

}  // namespace

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("mixture", TORCH_BOX(&mixture));
  m.impl("mixture_backward", TORCH_BOX(&mixture_backward));
  m.impl("mixture_expert_backward", TORCH_BOX(&mixture_expert_backward));
}
