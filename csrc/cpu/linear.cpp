// A linear layer of several networks for few samples on CPU, with or without a ReLU: every weight is
// read once, in order, by all threads together. For as few samples a matrix product costs more to
// start than to do. The mathematics is stem_fast/reference/linear.py's grouped_linear.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace {

using torch::stable::Tensor;

constexpr int kTile = 4;  // samples that share one read of a weight
// Weights a thread handles before another is worth waking.
constexpr int64_t kGrain = 16384;

struct Sizes {
  int64_t batch, inputs, outputs;
  bool relu;
};

// One output of n samples, from `unroll` sums each: one alone would wait for itself.
template <int n, int unroll, typename T, typename A = Sum<T>>
INLINE void dot(const T* x, const T* weight, A bias, T* y, const Sizes& s) {
  constexpr int lanes = Lanes<A>::n;
  typename Lanes<A>::type sums[n][unroll] = {};
  int64_t i = 0;
  for (; i + lanes * unroll <= s.inputs; i += lanes * unroll) {
    for (int u = 0; u < unroll; ++u) {
      typename Lanes<A>::type w;
      load(weight + i + u * lanes, w);
      for (int b = 0; b < n; ++b) {
        typename Lanes<A>::type value;
        load(x + b * s.inputs + i + u * lanes, value);
        sums[b][u] += w * value;
      }
    }
  }
  for (int b = 0; b < n; ++b) {
    A sum = bias;
    for (int u = 1; u < unroll; ++u) sums[b][0] += sums[b][u];
    for (int j = 0; j < lanes; ++j) sum += sums[b][0][j];
    for (int64_t k = i; k < s.inputs; ++k) {
      sum += static_cast<A>(weight[k]) * static_cast<A>(x[b * s.inputs + k]);
    }
    y[b * s.outputs] = static_cast<T>(s.relu && sum <= 0 ? A(0) : sum);
  }
}

// Rows [begin, end) of the weights of all networks; x[e] is what network e reads.
template <typename T>
INLINE void rows(const T* const* x, const T* weight, const T* bias, T* y, const Sizes& s,
                 int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t e = row / s.outputs;
    const T* w = weight + row * s.inputs;
    const auto offset = static_cast<Sum<T>>(bias[row]);
    T* out = y + e * s.batch * s.outputs + row % s.outputs;
    int64_t b = 0;
    for (; b + kTile <= s.batch; b += kTile) {
      dot<kTile, 2>(x[e] + b * s.inputs, w, offset, out + b * s.outputs, s);
    }
    for (; b < s.batch; ++b) dot<1, 4>(x[e] + b * s.inputs, w, offset, out + b * s.outputs, s);
  }
}

// A template cannot be multiversioned, so each type has its entry.
#define ENTRY(T)                                                                                 \
  MULTIVERSION void entry(const T* const* x, const T* weight, const T* bias, T* y,               \
                          const Sizes& s, int64_t begin, int64_t end) {                          \
    rows<T>(x, weight, bias, y, s, begin, end);                                                  \
  }
ENTRY(double)
ENTRY(float)
ENTRY(torch::headeronly::BFloat16)
ENTRY(torch::headeronly::Half)

Tensor grouped_linear(const Tensor& x_in, const std::vector<int64_t>& reads, const Tensor& weight_in,
                      const Tensor& bias_in, bool relu) {
  const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in),
               bias = torch::stable::contiguous(bias_in);
  const auto networks = static_cast<int64_t>(reads.size());
  STEM_FAST_CHECK(x.dim() == 3 && weight.dim() == 3 && bias.dim() == 2 &&
                      x.size(2) == weight.size(2) && bias.size(0) == weight.size(0) &&
                      bias.size(1) == weight.size(1) && networks <= weight.size(0),
                  "grouped_linear: x must be [N, B, I], weight [E, O, I] and bias [E, O], with at "
                  "most E reads");
  STEM_FAST_CHECK(x.scalar_type() == weight.scalar_type() &&
                      x.scalar_type() == bias.scalar_type(),
                  "grouped_linear: x, weight and bias must have one type");
  for (const int64_t read : reads) {
    STEM_FAST_CHECK(read >= 0 && read < x.size(0), "grouped_linear: reads must name one of the ",
                    x.size(0), " inputs; one is ", read);
  }
  const Sizes s{x.size(1), x.size(2), weight.size(1), relu};
  Tensor y = torch::stable::new_empty(x, {networks, s.batch, s.outputs});
  for_type(x.scalar_type(), "grouped_linear", [&](auto zero) {
    using T = decltype(zero);
    std::vector<const T*> inputs;
    for (const int64_t read : reads) {
      inputs.push_back(static_cast<const T*>(x.const_data_ptr()) + read * s.batch * s.inputs);
    }
    const int64_t grain = kGrain / std::max<int64_t>(s.inputs, 1) + 1;
    torch::stable::parallel_for(0, networks * s.outputs, grain, [&](int64_t begin, int64_t end) {
      entry(inputs.data(), static_cast<const T*>(weight.const_data_ptr()),
            static_cast<const T*>(bias.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), s,
            begin, end);
    });
  });
  return y;
}

}  // namespace

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
}
