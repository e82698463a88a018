// The backward pass of a bias and a ReLU on CPU: masks the gradient, sums it over the samples in one
// read of it and, if asked, transposes it. See relu_backward of stem_fast/reference/linear.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Samples of a partial sum: fixed, so that the sums are the same bits for any number of threads.
constexpr int64_t kBlock = 128;

// One row. Several together would read and write each sum once, but take half as long again: rows
// of a power of two lie on one another in the cache.
template <typename T, typename A = Sum<T>>
INLINE void mask(T* grad, const T* y, A* sums, int64_t width) {
  constexpr int lanes = Lanes<A>::n;
  int64_t h = 0;
  for (; h + lanes <= width; h += lanes) {
    typename Lanes<A>::type g, value, sum;
    load(grad + h, g);
    load(y + h, value);
    load(sums + h, sum);
    g = value <= 0 ? typename Lanes<A>::type{} : g;
    store(g, grad + h);
    store(sum + g, sums + h);
  }
  for (; h < width; ++h) {
    if (static_cast<A>(y[h]) <= 0) grad[h] = static_cast<T>(A(0));
    sums[h] += static_cast<A>(grad[h]);
  }
}

// Rows that make a line of the cache in each column of float32.
constexpr int kLine = 16;

// Four columns of kLine rows, past the caches where the place allows it: they are read much later.
template <typename T>
INLINE void four_columns(const T* rows, T* columns, int64_t width, int64_t batch) {
#ifdef __SSE2__
  if constexpr (std::is_same_v<T, float>) {
    __m128 parts[kLine / 4][4];
    for (int i = 0; i < kLine; ++i) parts[i / 4][i % 4] = _mm_loadu_ps(rows + i * width);
    for (auto& p : parts) _MM_TRANSPOSE4_PS(p[0], p[1], p[2], p[3]);
    const bool aligned = reinterpret_cast<uintptr_t>(columns) % 16 == 0 && batch % 4 == 0;
    for (int i = 0; i < kLine; ++i) {
      float* to = columns + i / 4 * batch + i % 4 * 4;
      aligned ? _mm_stream_ps(to, parts[i % 4][i / 4]) : _mm_storeu_ps(to, parts[i % 4][i / 4]);
    }
    return;
  }
#endif
  for (int j = 0; j < 4; ++j) {
    T line[kLine];
    for (int i = 0; i < kLine; ++i) line[i] = rows[i * width + j];
    std::memcpy(columns + j * batch, line, sizeof(line));
  }
}

// Rows [n, width] as columns that are `batch` long.
template <typename T>
INLINE void transpose(const T* rows, T* columns, int64_t n, int64_t width, int64_t batch) {
  int64_t b = 0;
  for (; b + kLine <= n; b += kLine) {
    int64_t h = 0;
    for (; h + 4 <= width; h += 4) {
      four_columns(rows + b * width + h, columns + h * batch + b, width, batch);
    }
    for (; h < width; ++h) {
      for (int i = 0; i < kLine; ++i) columns[h * batch + b + i] = rows[(b + i) * width + h];
    }
  }
  for (; b < n; ++b) {
    for (int64_t h = 0; h < width; ++h) columns[h * batch + b] = rows[b * width + h];
  }
  fence();
}

// Blocks [begin, end) of samples, each with its sums.
template <typename T, typename A = Sum<T>>
INLINE void mask_blocks(T* grad, const T* y, A* sums, T* columns, int64_t batch, int64_t width,
                        int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    A* sum = sums + block * width;
    std::fill(sum, sum + width, A(0));
    const int64_t first = block * kBlock, last = std::min(batch, first + kBlock);
    for (int64_t b = first; b < last; ++b) mask(grad + b * width, y + b * width, sum, width);
    if (columns == nullptr) continue;
    transpose(grad + first * width, columns + first, last - first, width, batch);
  }
}

// A template cannot be multiversioned, so each type has its entry.
#define ENTRY(T)                                                                                \
  MULTIVERSION void entry(T* grad, const T* y, Sum<T>* sums, T* columns, int64_t batch,         \
                          int64_t width, int64_t begin, int64_t end) {                          \
    mask_blocks<T>(grad, y, sums, columns, batch, width, begin, end);                           \
  }
ENTRY(double)
ENTRY(float)
ENTRY(torch::headeronly::BFloat16)
ENTRY(torch::headeronly::Half)

Tensor relu_backward(Tensor grad, const Tensor& y_in, std::optional<Tensor> transposed) {
  const Tensor y = torch::stable::contiguous(y_in);
  STEM_FAST_CHECK(grad.dim() == 2 && y.dim() == 2 && grad.size(0) == y.size(0) &&
                      grad.size(1) == y.size(1) && grad.scalar_type() == y.scalar_type(),
                  "relu_backward: the gradient and y must be [B, H] of one type");
  STEM_FAST_CHECK(grad.is_contiguous(), "relu_backward: the gradient must be contiguous");
  const int64_t batch = y.size(0), width = y.size(1);
  STEM_FAST_CHECK(!transposed || (transposed->dim() == 2 && transposed->size(0) == width &&
                                  transposed->size(1) == batch && transposed->is_contiguous() &&
                                  transposed->scalar_type() == y.scalar_type()),
                  "relu_backward: transposed must be contiguous, [H, B], of the gradient's type");
  Tensor sums;
  for_type(y.scalar_type(), "relu_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = Sum<T>;
    const ScalarType type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    sums = torch::stable::new_zeros(y, {width}, type);
    const int64_t blocks = (batch + kBlock - 1) / kBlock;
    std::vector<A> partial(blocks * width);
    T* columns = transposed ? static_cast<T*>(transposed->mutable_data_ptr()) : nullptr;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      entry(static_cast<T*>(grad.mutable_data_ptr()), static_cast<const T*>(y.const_data_ptr()),
            partial.data(), columns, batch, width, begin, end);
    });
    A* total = static_cast<A*>(sums.mutable_data_ptr());
    for (int64_t i = 0; i < blocks; ++i) {
      for (int64_t h = 0; h < width; ++h) total[h] += partial[i * width + h];
    }
  });
  return sums;
}

}  // namespace

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) { m.impl("relu_backward", TORCH_BOX(&relu_backward)); }
