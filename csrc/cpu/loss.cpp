// The loss of several tasks on CPU, some of whose labels are missing, and its gradient; see
// stem_fast/reference/loss.py.
//
//   logits [B, T]   float64, float32, bfloat16 or float16, most often task by task in memory
//   labels [B, T]   NaN where missing
//   means  [T]      float32, for float64 float64

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a partial sum: fixed, so that the sums are the same bits for any number of threads.
constexpr int64_t kBlock = 1024;
// Labels a thread handles before another is worth waking.
constexpr int64_t kGrain = 32768;

// log(1 + exp(-|x|)) to its last digit, however small it is, in half the time of log1p.
template <typename A>
INLINE A log1p_exp(A x) {
  const A e = std::exp(-std::abs(x)), u = 1 + e;
  return u == 1 ? e : std::log(u) * (e / (u - 1));
}

// [B, T] of any strides.
template <typename T>
struct Matrix {
  T* data;
  int64_t row, column;

  T& operator()(int64_t b, int64_t t) const { return data[b * row + t * column]; }
};

template <typename T>
Matrix<const T> read(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// What both passes look at.
class Batch {
 public:
  int64_t rows, tasks;

  Batch(const char* op, const Tensor& logits, const Tensor& labels,
        const std::vector<int64_t>& regression, const std::optional<Tensor>& mask,
        const std::optional<Tensor>& weights)
      : rows(logits.dim() == 2 ? logits.size(0) : 0),
        tasks(logits.dim() == 2 ? logits.size(1) : 0),
        regression_(regression),
        logits_(logits),
        labels_(labels) {
    const auto fits = [&](const Tensor& each) {
      return each.dim() == 2 && each.size(0) == rows && each.size(1) == tasks;
    };
    STEM_FAST_CHECK(fits(logits) && fits(labels) &&
                        static_cast<int64_t>(regression.size()) == tasks,
                    op, ": logits and labels must be [B, T], with T kinds of tasks");
    STEM_FAST_CHECK(!mask || (fits(*mask) && mask->scalar_type() == ScalarType::Bool), op,
                    ": the mask must be bool [", rows, ", ", tasks, "]");
    STEM_FAST_CHECK(!weights || (weights->dim() == 1 && weights->size(0) == rows), op,
                    ": the weights of samples must be [", rows, "]");
    if (labels.scalar_type() != sums()) labels_ = torch::stable::to(labels, sums());
    if (mask) mask_ = *mask;
    if (weights) weights_ = torch::stable::contiguous(torch::stable::to(*weights, sums()));
  }

  // What sums of the logits' type are kept in.
  ScalarType sums() const {
    return logits_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Calls run(row, logit, label, weight) for the labels of a task that count, of rows [begin, end).
  template <typename T, typename F>
  void each(int64_t begin, int64_t end, int64_t task, const F& run) const {
    using A = Sum<T>;
    const auto logits = read<T>(logits_);
    const auto labels = read<A>(labels_);
    const auto mask = mask_ ? read<bool>(*mask_) : Matrix<const bool>{};
    const A* weights = weights_ ? static_cast<const A*>(weights_->const_data_ptr()) : nullptr;
    for (int64_t b = begin; b < end; ++b) {
      const A y = labels(b, task);
      if (y != y || (mask.data && !mask(b, task))) continue;
      run(b, static_cast<A>(logits(b, task)), y, weights ? weights[b] : A(1));
    }
  }

  bool is_regression(int64_t task) const { return regression_[task] != 0; }

  // Calls run(block, its first row, the row after its last) from several threads.
  template <typename F>
  void blocks(const F& run) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * std::max<int64_t>(1, tasks)));
    torch::stable::parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run(i, i * kBlock, std::min(rows, (i + 1) * kBlock));
    });
  }
  int64_t count() const { return (rows + kBlock - 1) / kBlock; }

 private:
  const std::vector<int64_t>& regression_;
  Tensor logits_, labels_;
  std::optional<Tensor> mask_, weights_;
};

std::tuple<Tensor, Tensor> task_losses(const Tensor& logits, const Tensor& labels,
                                       const std::vector<int64_t>& regression,
                                       const std::optional<Tensor>& mask,
                                       const std::optional<Tensor>& sample_weights,
                                       const std::optional<Tensor>& counts) {
  const Batch batch("task_losses", logits, labels, regression, mask, sample_weights);
  STEM_FAST_CHECK(!counts || (counts->dim() == 1 && counts->size(0) == batch.tasks &&
                              counts->scalar_type() == ScalarType::Long),
                  "task_losses: counts must be int64 [", batch.tasks, "]");
  Tensor means = torch::stable::new_empty(logits, {batch.tasks}, batch.sums());
  Tensor divisors = torch::stable::new_empty(logits, {batch.tasks}, ScalarType::Long);
  for_type(logits.scalar_type(), "task_losses", [&](auto zero) {
    using T = decltype(zero);
    using A = Sum<T>;
    std::vector<double> totals(batch.count() * batch.tasks);
    std::vector<int64_t> found(totals.size());
    batch.blocks([&](int64_t block, int64_t begin, int64_t end) {
      for (int64_t t = 0; t < batch.tasks; ++t) {
        double total = 0;
        int64_t count = 0;
        const bool squares = batch.is_regression(t);
        batch.template each<T>(begin, end, t, [&](int64_t, A x, A y, A weight) {
          const A loss = squares ? (x - y) * (x - y) : (x < 0 ? A(0) : x) - x * y + log1p_exp(x);
          total += loss * weight;
          ++count;
        });
        totals[block * batch.tasks + t] = total, found[block * batch.tasks + t] = count;
      }
    });
    A* mean = static_cast<A*>(means.mutable_data_ptr());
    auto* divisor = static_cast<int64_t*>(divisors.mutable_data_ptr());
    const auto* given = counts ? static_cast<const int64_t*>(counts->const_data_ptr()) : nullptr;
    for (int64_t t = 0; t < batch.tasks; ++t) {
      double total = 0;
      int64_t count = 0;
      for (size_t at = t; at < totals.size(); at += batch.tasks) {
        total += totals[at], count += found[at];
      }
      divisor[t] = std::max<int64_t>(1, given ? given[t * counts->stride(0)] : count);
      mean[t] = static_cast<A>(total / static_cast<double>(divisor[t]));
    }
  });
  return {means, divisors};
}

Tensor task_losses_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                            const std::vector<int64_t>& regression,
                            const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& sample_weights, const Tensor& divisors) {
  const Batch batch("task_losses_backward", logits, labels, regression, mask, sample_weights);
  STEM_FAST_CHECK(grad.dim() == 1 && grad.size(0) == batch.tasks && divisors.dim() == 1 &&
                      divisors.size(0) == batch.tasks && grad.scalar_type() == batch.sums() &&
                      divisors.scalar_type() == ScalarType::Long && divisors.is_contiguous(),
                  "task_losses_backward: the gradient must be [", batch.tasks,
                  "] of the means' type, and divisors int64 [", batch.tasks, "]");
  Tensor out = torch::stable::empty_like(logits);
  for_type(logits.scalar_type(), "task_losses_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = Sum<T>;
    const Matrix<T> slopes{static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1)};
    const A* given = static_cast<const A*>(grad.const_data_ptr());
    const auto* divisor = static_cast<const int64_t*>(divisors.const_data_ptr());
    batch.blocks([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t t = 0; t < batch.tasks; ++t) {
        for (int64_t b = begin; b < end; ++b) slopes(b, t) = static_cast<T>(A(0));
        const A scale = given[t * grad.stride(0)] / static_cast<A>(divisor[t]);
        const bool squares = batch.is_regression(t);
        batch.template each<T>(begin, end, t, [&](int64_t b, A x, A y, A weight) {
          const A slope = squares ? 2 * (x - y) : 1 / (1 + std::exp(-x)) - y;
          slopes(b, t) = static_cast<T>(slope * scale * weight);
        });
      }
    });
  });
  return out;
}

}  // namespace

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("task_losses", TORCH_BOX(&task_losses));
  m.impl("task_losses_backward", TORCH_BOX(&task_losses_backward));
}
