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
// Gates whose sums stay in registers together; y, which one sample's further gates read again, is
// in the first-level cache by then.
constexpr int kGateTile = 4;
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

// out[k..k+n) of one sample; p is [K, E].
template <int n, typename T, typename A = Sum<T>>
INLINE void mix(const T* y, const A* p, T* out, int64_t k, const Sizes& s) {
  constexpr int lanes = Lanes<A>::n;
  const int64_t expert_stride = s.batch * s.width;
  int64_t h = 0;
  for (; h + lanes <= s.width; h += lanes) {
    typename Lanes<A>::type sums[n] = {};
    for (int64_t e = 0; e < s.experts; ++e) {
      typename Lanes<A>::type value;
      load(y + e * expert_stride + h, value);
      for (int i = 0; i < n; ++i) sums[i] += p[(k + i) * s.experts + e] * value;
    }
    for (int i = 0; i < n; ++i) store(sums[i], out + (k + i) * expert_stride + h);
  }
  for (; h < s.width; ++h) {
    A sums[n] = {};
    for (int64_t e = 0; e < s.experts; ++e) {
      const A value = static_cast<A>(y[e * expert_stride + h]);
      for (int i = 0; i < n; ++i) sums[i] += p[(k + i) * s.experts + e] * value;
    }
    for (int i = 0; i < n; ++i) out[(k + i) * expert_stride + h] = static_cast<T>(sums[i]);
  }
}

template <typename T, typename A = Sum<T>>
INLINE void forward(const T* y, const T* logits, const uint64_t* see, T* out, const Sizes& s,
                    int64_t begin, int64_t end) {
  A p[kMaxGates * kMaxExperts];
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t k = 0; k < s.gates; ++k) {
      softmax(logits + (k * s.batch + b) * s.experts, s.experts, see[k], p + k * s.experts);
    }
    const T* yb = y + b * s.width;
    T* ob = out + b * s.width;
    int64_t k = 0;
    for (; k + kGateTile <= s.gates; k += kGateTile) mix<kGateTile>(yb, p, ob, k, s);
    switch (s.gates - k) {
      case 3: mix<3>(yb, p, ob, k, s); break;
      case 2: mix<2>(yb, p, ob, k, s); break;
      case 1: mix<1>(yb, p, ob, k, s); break;
    }
  }
}

// For gates k..k+n and expert e of one sample: dp[k, e], and their part of dy[e]. `first` says
// whether dy[e], kept in sums so that it is rounded once, starts here.
template <int n, typename T, typename A = Sum<T>>
INLINE void unmix(const T* grad, const T* y, const A* taught, A* dp, A* dy, int64_t k, int64_t e,
                  bool first, const Sizes& s) {
  constexpr int lanes = Lanes<A>::n;
  const int64_t stride = s.batch * s.width;
  typename Lanes<A>::type dots[n] = {};
  A tail[n] = {}, weight[n];
  for (int i = 0; i < n; ++i) weight[i] = taught[(k + i) * s.experts + e];
  int64_t h = 0;
  for (; h + lanes <= s.width; h += lanes) {
    typename Lanes<A>::type value, sum = {};
    load(y + h, value);
    if (!first) load(dy + h, sum);
    for (int i = 0; i < n; ++i) {
      typename Lanes<A>::type g;
      load(grad + (k + i) * stride + h, g);
      dots[i] += g * value;
      sum += weight[i] * g;
    }
    store(sum, dy + h);
  }
  for (; h < s.width; ++h) {
    A sum = first ? A(0) : dy[h];
    for (int i = 0; i < n; ++i) {
      const A g = static_cast<A>(grad[(k + i) * stride + h]);
      tail[i] += g * static_cast<A>(y[h]);
      sum += weight[i] * g;
    }
    dy[h] = sum;
  }
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < lanes; ++j) tail[i] += dots[i][j];
    dp[(k + i) * s.experts + e] = tail[i];
  }
}

template <typename T, typename A = Sum<T>>
INLINE void backward(const T* grad, const T* y, const T* logits, const uint64_t* see,
                     const uint64_t* learn, T* dy, T* dlogits, A* scratch, const Sizes& s,
                     int64_t begin, int64_t end) {
  A p[kMaxGates * kMaxExperts], taught[kMaxGates * kMaxExperts], dp[kMaxGates * kMaxExperts];
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t k = 0; k < s.gates; ++k) {
      A* row = p + k * s.experts;
      softmax(logits + (k * s.batch + b) * s.experts, s.experts, see[k], row);
      for (int64_t e = 0; e < s.experts; ++e) {
        taught[k * s.experts + e] = learn[k] >> e & 1 ? row[e] : A(0);
      }
    }
    const T* gb = grad + b * s.width;
    for (int64_t e = 0; e < s.experts; ++e) {
      const T* ye = y + (e * s.batch + b) * s.width;
      T* dye = dy + (e * s.batch + b) * s.width;
      A* sums;
      if constexpr (std::is_same_v<T, A>) {
        sums = dye;
      } else {
        sums = scratch;
      }
      int64_t k = 0;
      for (; k + kGateTile <= s.gates; k += kGateTile) {
        unmix<kGateTile>(gb, ye, taught, dp, sums, k, e, k == 0, s);
      }
      switch (s.gates - k) {
        case 3: unmix<3>(gb, ye, taught, dp, sums, k, e, k == 0, s); break;
        case 2: unmix<2>(gb, ye, taught, dp, sums, k, e, k == 0, s); break;
        case 1: unmix<1>(gb, ye, taught, dp, sums, k, e, k == 0, s); break;
      }
      if constexpr (!std::is_same_v<T, A>) {
        for (int64_t h = 0; h < s.width; ++h) dye[h] = static_cast<T>(sums[h]);
      }
    }
    for (int64_t k = 0; k < s.gates; ++k) {
      const A *row = p + k * s.experts, *drow = dp + k * s.experts;
      A dot = 0;
      for (int64_t e = 0; e < s.experts; ++e) dot += row[e] * drow[e];
      T* out = dlogits + (k * s.batch + b) * s.experts;
      for (int64_t e = 0; e < s.experts; ++e) out[e] = static_cast<T>(row[e] * (drow[e] - dot));
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
                                   Sum<T>* scratch, const Sizes& s, int64_t begin, int64_t end) { \
    backward<T>(grad, y, logits, see, learn, dy, dlogits, scratch, s, begin, end);                \
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
      std::vector<Sum<T>> scratch(std::is_same_v<T, Sum<T>> ? 0 : s.width);
      backward_entry(static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(y.const_data_ptr()),
          static_cast<const T*>(logits.const_data_ptr()), see.data(), learn.data(),
          static_cast<T*>(dy.mutable_data_ptr()), static_cast<T*>(dlogits.mutable_data_ptr()),
          scratch.data(), s, begin, end);
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
