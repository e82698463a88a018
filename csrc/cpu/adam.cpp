// Adam of a batch's rows on CPU, with the steps that they missed: one read and one write of a row's
// weight and state. See reference.adam_rows for the arguments, stem_fast/optim.py for the table of
// steps and the mathematics.
//
// Rows are independent, so the results are the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of the table of steps.
enum Column { kSize, kRoot, kDecay, kLeft, kMoments, kColumns = kMoments + 7 };
// Rows a thread handles before another is worth waking.
constexpr int64_t kGrain = 64;
// Rows asked from memory ahead of their use.
constexpr int64_t kAhead = 8;
// Steps of a replay between two looks at whether anything still moves.
constexpr int64_t kLook = 32;
// Momentum of which so little is left moves nothing: 2^-60.
constexpr double kSpent = 0x1p-60;

// A table of any float type, of which one row at a time is read and written in A.
struct Table {
  char* data;
  ScalarType type;
  int64_t width, item;

  Table(const Tensor& tensor, int64_t width)
      : data(static_cast<char*>(tensor.mutable_data_ptr())),
        type(tensor.scalar_type()),
        width(width),
        item(tensor.element_size()) {}

  template <typename F>
  INLINE void typed(int64_t row, const F& run) const {
    void* at = data + row * width * item;
    switch (type) {
      case ScalarType::Double: return run(static_cast<double*>(at));
      case ScalarType::Float: return run(static_cast<float*>(at));
      case ScalarType::BFloat16: return run(static_cast<BFloat16*>(at));
      default: return run(static_cast<Half*>(at));
    }
  }
  template <typename A>
  INLINE void read(int64_t row, A* __restrict to) const {
    typed(row, [&](const auto* from) INLINE_LAMBDA {
      for (int64_t i = 0; i < width; ++i) to[i] = static_cast<A>(from[i]);
    });
  }
  template <typename A>
  INLINE void write(int64_t row, const A* __restrict from) const {
    typed(row, [&]<typename T>(T* to) INLINE_LAMBDA {
      for (int64_t i = 0; i < width; ++i) to[i] = static_cast<T>(from[i]);
    });
  }
  INLINE void prefetch(int64_t row) const {
    const char* at = data + row * width * item;
    for (int64_t i = 0; i < width * item; i += 64) __builtin_prefetch(at + i, 1);
  }
};

struct Job {
  Table weight, exp_avg, exp_avg_sq;
  int32_t* last;
  const int64_t* rows;  // nullptr: all
  const Table* grad;    // nullptr: none
  const double* steps;
  int64_t base, now, width;
  double beta1, beta2, eps;
  bool decoupled, l2;

  const double* step(int64_t t) const { return steps + (t - base) * kColumns; }
};

// The three of a row, in the type of sums.
template <typename A>
struct Row {
  A *__restrict w, *__restrict m, *__restrict v;
  int64_t width;
};

// One step with the gradient g (nullptr: zero).
template <typename A>
INLINE void make_step(const Job& job, const double* step, const A* __restrict g, const Row<A>& row) {
  const A beta2 = job.beta2, new1 = 1 - job.beta1, new2 = 1 - job.beta2, eps = job.eps;
  const A size = step[kSize], root = step[kRoot];
  const A decay = job.decoupled ? 0 : step[kDecay], kept = job.decoupled ? step[kDecay] : 1;
  A *__restrict w = row.w, *__restrict m = row.m, *__restrict v = row.v;
  const int64_t width = row.width;
  for (int64_t i = 0; i < width; ++i) {
    const A grad = (g ? g[i] : A(0)) + decay * w[i];
    m[i] += (grad - m[i]) * new1;
    v[i] = v[i] * beta2 + new2 * grad * grad;
    w[i] = w[i] * kept - size * m[i] / (std::sqrt(v[i]) * root + eps);
  }
}

// Whether all of them are below a number that nothing else is small against.
template <typename A>
INLINE bool gone(const A* values, int64_t width) {
  constexpr A least = std::is_same_v<A, float> ? 1e-30 : 1e-200;
  int above = 0;
  for (int64_t i = 0; i < width; ++i) above |= std::abs(values[i]) > least;
  return !above;
}

// Steps `from` + 1 .. `to` with gradients decay * w.
template <typename A>
INLINE void replay(const Job& job, int64_t from, int64_t to, const Row<A>& row) {
  for (int64_t t = from + 1; t <= to; ++t) {
    // L2 alone moves the row, and there may be nothing left to pull.
    if ((t - from) % kLook == 0 && gone(row.w, row.width) && gone(row.m, row.width)) {
      const A left = std::pow(job.beta2, static_cast<double>(to - t + 1));
      for (int64_t i = 0; i < row.width; ++i) {
        row.w[i] = row.m[i] = 0;
        row.v[i] *= left;
      }
      return;
    }
    make_step<A>(job, job.step(t), nullptr, row);
  }
}

// The sums over missed steps of Schedule, as central moments. f(x) = 1 / (sqrt(v) * x + eps) is
// summed over the steps' x by its series around their mean.
struct Series {
  double weight, mean, c2, c3, c4, c5, c6;

  Series(const double* line, double reference) {
    const double* raw = line + kMoments;
    weight = raw[0];
    double n[7];
    for (int p = 0; p < 7; ++p) n[p] = weight != 0 ? raw[p] / weight : 0;
    const double d = n[1], d2 = d * d, d3 = d2 * d;
    mean = reference + d;
    c2 = n[2] - d2;
    c3 = n[3] - 3 * d * n[2] + 2 * d3;
    c4 = n[4] - 4 * d * n[3] + 6 * d2 * n[2] - 3 * d2 * d2;
    c5 = n[5] - 5 * d * n[4] + 10 * d2 * n[3] - 10 * d3 * n[2] + 4 * d2 * d3;
    c6 = n[6] - 6 * d * n[5] + 15 * d2 * n[4] - 20 * d3 * n[3] + 15 * d2 * d2 * n[2] - 5 * d3 * d3;
  }

  // Whether the terms left out are below the rounding of A.
  template <typename A>
  bool converges() const {
    constexpr double most = std::is_same_v<A, float> ? 1e-7 : 1e-11;
    const double cube = mean * mean * mean;
    return std::abs(c6) <= most * cube * cube && weight != 0;
  }
};

// Steps `from` + 1 .. `to` without any gradient: m and v decay, and w moves by m times a sum that
// depends on v and the steps alone.
template <typename A>
INLINE void coast(const Job& job, int64_t from, int64_t to, const Row<A>& row,
                  A* __restrict total) {
  const double* start = job.step(from);
  const double root2 = std::sqrt(job.beta2), missed = static_cast<double>(to - from);
  const A eps = job.eps;
  const Series series(start, root2 * job.step(from + 1)[kRoot]);
  if (gone(row.m, row.width)) {  // never trained, or long ago
    std::fill(total, total + row.width, A(0));
  } else if (!job.grad && series.converges<A>()) {
    const A* __restrict v = row.v;
    const A mean = series.mean, c2 = series.c2, c3 = series.c3, c4 = series.c4, c5 = series.c5,
            c6 = series.c6, weight = series.weight;
    for (int64_t i = 0; i < row.width; ++i) {
      const A s = std::sqrt(v[i]), f = 1 / (s * mean + eps), h = s * f;
      total[i] = weight * f * (1 + h * h * (c2 - h * (c3 - h * (c4 - h * (c5 - h * c6)))));
    }
  } else {
    std::fill(total, total + row.width, A(0));
    double momentum = job.beta1, second = root2;
    for (int64_t t = from + 1; t <= to && momentum > kSpent; ++t) {
      const double* step = job.step(t);
      const A weight = step[kSize] * momentum * start[kLeft] / step[kLeft];
      const A x = second * step[kRoot];
      for (int64_t i = 0; i < row.width; ++i) {
        total[i] += weight / (std::sqrt(row.v[i]) * x + eps);
      }
      momentum *= job.beta1;
      second *= root2;
    }
  }
  const A left1 = std::pow(job.beta1, missed), left2 = std::pow(job.beta2, missed);
  const A kept = job.step(to)[kLeft] / start[kLeft];
  for (int64_t i = 0; i < row.width; ++i) {
    row.w[i] = kept * (row.w[i] - row.m[i] * total[i]);
    row.m[i] *= left1;
    row.v[i] *= left2;
  }
}

template <typename A>
INLINE void run(const Job& job, int64_t begin, int64_t end) {
  std::vector<A> space(5 * job.width);
  A* part = space.data();
  const Row<A> row{part, part + job.width, part + 2 * job.width, job.width};
  A *grad = part + 3 * job.width, *total = part + 4 * job.width;
  const int64_t due = job.grad ? job.now - 1 : job.now;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t at = job.rows ? job.rows[u] : u;
    if (job.rows && at == 0) continue;
    if (u + 2 * kAhead < end) {
      __builtin_prefetch(job.last + (job.rows ? job.rows[u + 2 * kAhead] : u + 2 * kAhead), 1);
    }
    if (const int64_t next = u + kAhead; next < end) {
      const int64_t ahead = job.rows ? job.rows[next] : next;
      if (job.grad || job.last[ahead] < due) {
        job.weight.prefetch(ahead);
        job.exp_avg.prefetch(ahead);
        job.exp_avg_sq.prefetch(ahead);
      }
    }
    const int64_t made = std::max<int64_t>(job.last[at], job.base);
    if (made >= job.now) continue;
    job.weight.read(at, row.w);
    job.exp_avg.read(at, row.m);
    job.exp_avg_sq.read(at, row.v);
    if (made < due) {
      if (job.l2) {
        replay(job, made, due, row);
      } else {
        coast(job, made, due, row, total);
      }
    }
    if (job.grad) {
      job.grad->read(u, grad);
      make_step(job, job.step(job.now), grad, row);
    }
    job.weight.write(at, row.w);
    job.exp_avg.write(at, row.m);
    job.exp_avg_sq.write(at, row.v);
    job.last[at] = static_cast<int32_t>(job.now);
  }
}

// Rows that L2 pulls to zero end in numbers so small that the processor slows down a hundredfold.
class FlushToZero {
 public:
#ifdef __SSE2__
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  unsigned int before_;
#endif
};

// A template cannot be multiversioned, so each type has its entry.
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, float) {
  run<float>(job, begin, end);
}
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, double) {
  run<double>(job, begin, end);
}

void check(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const Tensor& last, const std::optional<Tensor>& rows, const std::optional<Tensor>& grad,
           const Tensor& steps, const Tensor& clock) {
  STD_TORCH_CHECK(weight.dim() == 2, "adam_rows: weight must be [R, W]");
  const int64_t size = weight.size(0), width = weight.size(1);
  for (const Tensor* state : {&exp_avg, &exp_avg_sq}) {
    STD_TORCH_CHECK(state->dim() == 2 && state->size(0) == size && state->size(1) == width,
                    "adam_rows: exp_avg and exp_avg_sq must be as weight, [", size, ", ", width, "]");
  }
  STD_TORCH_CHECK(last.dim() == 1 && last.size(0) == size && last.scalar_type() == ScalarType::Int,
                  "adam_rows: last must be int32 [", size, "]");
  STD_TORCH_CHECK(weight.is_contiguous() && exp_avg.is_contiguous() && exp_avg_sq.is_contiguous() &&
                      last.is_contiguous(),
                  "adam_rows: what is changed in place must be contiguous");
  STD_TORCH_CHECK(steps.dim() == 2 && steps.size(1) == kColumns &&
                      steps.scalar_type() == ScalarType::Double && clock.numel() == 2 &&
                      clock.scalar_type() == ScalarType::Long,
                  "adam_rows: steps must be float64 [N, ", static_cast<int64_t>(kColumns),
                  "] and clock int64 [2]");
  const int64_t count = rows ? rows->numel() : size;
  STD_TORCH_CHECK(!rows || (rows->dim() == 1 && rows->scalar_type() == ScalarType::Long),
                  "adam_rows: rows must be int64 [U]");
  STD_TORCH_CHECK(!grad || (grad->dim() == 2 && grad->size(0) == count && grad->size(1) == width),
                  "adam_rows: grad must be [", count, ", ", width, "]");
}

void adam_rows(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& last, const std::optional<Tensor>& rows_in,
               const std::optional<Tensor>& grad_in, const Tensor& steps_in, const Tensor& clock_in,
               double beta1, double beta2, double eps, bool decoupled, bool l2) {
  check(weight, exp_avg, exp_avg_sq, last, rows_in, grad_in, steps_in, clock_in);
  const Tensor steps = torch::stable::contiguous(steps_in);
  const Tensor clock = torch::stable::contiguous(clock_in);
  const auto* now = static_cast<const int64_t*>(clock.const_data_ptr());
  STD_TORCH_CHECK(now[0] >= 0 && now[1] >= now[0] && now[1] - now[0] < steps.size(0),
                  "adam_rows: the table has ", steps.size(0), " lines for steps ", now[0], " to ",
                  now[1]);
  const int64_t size = weight.size(0), width = weight.size(1);
  auto* made = static_cast<int32_t*>(last.mutable_data_ptr());
  std::optional<Tensor> rows, grad;
  std::optional<Table> gradient;
  if (rows_in) rows = torch::stable::contiguous(*rows_in);
  if (grad_in) {
    grad = torch::stable::contiguous(*grad_in);
    gradient.emplace(*grad, width);
  }
  const int64_t count = rows ? rows->numel() : size;
  const auto* row = rows ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr;
  for (int64_t u = 0; u < count; ++u) {
    const int64_t at = row ? row[u] : u;
    STD_TORCH_CHECK(at >= 0 && at < size, "adam_rows: row ", at, " at ", u,
                    " is outside the table of ", size, " rows");
  }
  const Job job{{weight, width}, {exp_avg, width}, {exp_avg_sq, width},
                made, row, gradient ? &*gradient : nullptr,
                static_cast<const double*>(steps.const_data_ptr()), now[0], now[1], width,
                beta1, beta2, eps, decoupled, l2};
  for_type(weight.scalar_type(), "adam_rows", [&](auto zero) {
    torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      const FlushToZero mode;
      run_entry(job, begin, end, Sum<decltype(zero)>());
    });
  });
}

}  // namespace

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) { m.impl("adam_rows", TORCH_BOX(&adam_rows)); }
