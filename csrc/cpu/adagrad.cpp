// Adagrad of a batch's rows on CPU: one read and one write of a row's weight and sum. See
// reference.adagrad_rows for the arguments.
//
// Rows are independent and summed in a fixed order, so the results are the same bits for any number
// of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "lanes.h"
#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Job {
  Table weight, sum;
  const int64_t* rows;  // nullptr: all
  const Table* grad;
  double lr, decay, eps;
  int64_t width;
};

// Sums of every kLanes-th square, which one register holds, and then of those.
template <typename A>
INLINE A mean_square(const A* __restrict g, int64_t width) {
  constexpr int kLanes = 64 / sizeof(A);
  A part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) part[k] += g[i + k] * g[i + k];
  }
  for (int k = 0; i < width; ++i, ++k) part[k] += g[i] * g[i];
  A sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += part[k];
  return sum / width;
}

template <typename A>
INLINE void run(const Job& job, int64_t begin, int64_t end) {
  std::vector<A> space(3 * job.width);
  A *__restrict w = space.data(), *__restrict g = w + job.width, *__restrict sum = g + job.width;
  const A lr = job.lr, decay = job.decay, eps = job.eps;
  for_rows(job.rows, begin, end, {&job.weight, &job.sum}, [&](int64_t u, int64_t at) INLINE_LAMBDA {
    job.weight.read(at, w);
    job.grad->read(u, g);
    job.sum.read(at, sum);
    for (int64_t i = 0; i < job.width; ++i) g[i] += decay * w[i];
    if (job.sum.width == job.width) {
      for (int64_t i = 0; i < job.width; ++i) {
        sum[i] += g[i] * g[i];
        w[i] -= lr * g[i] / (std::sqrt(sum[i]) + eps);
      }
    } else {
      sum[0] += mean_square(g, job.width);
      const A size = lr / (std::sqrt(sum[0]) + eps);
      for (int64_t i = 0; i < job.width; ++i) w[i] -= size * g[i];
    }
    job.weight.write(at, w);
    job.sum.write(at, sum);
  });
}

// A template cannot be multiversioned, so each type has its entry.
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, float) {
  run<float>(job, begin, end);
}
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, double) {
  run<double>(job, begin, end);
}

void adagrad_rows(const Tensor& weight, const Tensor& sum, const std::optional<Tensor>& rows_in,
                  const Tensor& grad_in, const Tensor& options_in, double eps) {
  const Rows rows("adagrad_rows", weight, rows_in, grad_in);
  const int64_t size = weight.size(0), width = weight.size(1);
  STEM_FAST_CHECK((sum.dim() == 1 || (sum.dim() == 2 && sum.size(1) == width)) &&
                      sum.size(0) == size,
                  "adagrad_rows: sum must be [", size, "] or [", size, ", ", width, "]");
  STEM_FAST_CHECK(sum.is_contiguous(), "adagrad_rows: what is changed in place must be contiguous");
  STEM_FAST_CHECK(options_in.numel() == 2 && options_in.scalar_type() == ScalarType::Double,
                  "adagrad_rows: options must be float64 [2]");
  if (width == 0) return;
  const Tensor options = torch::stable::contiguous(options_in);
  const auto* option = static_cast<const double*>(options.const_data_ptr());
  const Job job{{weight, width}, {sum, sum.dim() == 1 ? 1 : width}, rows.named(), rows.grad(),
                option[0], option[1], eps, width};
  for_type(weight.scalar_type(), "adagrad_rows", [&](auto zero) {
    torch::stable::parallel_for(0, rows.count, kGrain, [&](int64_t begin, int64_t end) {
      run_entry(job, begin, end, Sum<decltype(zero)>());
    });
  });
}

}  // namespace

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) { m.impl("adagrad_rows", TORCH_BOX(&adagrad_rows)); }
