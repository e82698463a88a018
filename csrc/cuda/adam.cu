// Adam of a batch's rows on CUDA, with the steps that they missed: one read and one write of a row's
// weight and state. See reference.adam_rows for the arguments, docs/exact-adam.md for the table of
// steps and the mathematics.
//
// Every element is one thread's, so results repeat bit for bit; nothing waits for the device.

#include <cmath>
#include <optional>

#include "../adam_table.h"
#include "rows.cuh"

namespace stem_fast {
namespace {

constexpr int kThreads = 256;
// Blocks of a multiprocessor: some work while others wait for memory. Of more, registers spill.
template <typename T, bool l2>
constexpr int kBlocks = std::is_same_v<T, double> ? 3 : l2 ? 2 : 4;

template <typename T, typename S>
struct Adam {
  T* weight;
  S* exp_avg;
  Sum<T>* exp_avg_sq;
  int32_t* last;
  const int64_t* rows;  // nullptr: all
  const T* grad;        // nullptr: none
  const double* steps;
  const int64_t* clock;
  int64_t count, size;  // of rows to handle, of the table
  int64_t lines;
  int width;
  double beta1, beta2, root2, eps;
  double log1, log2;  // of beta1 and beta2, to base 2: pow spills registers
  bool decoupled;
};

// A thread's elements of a row.
template <typename A, int n>
struct Elements {
  A w[n], m[n], v[n];

  // Whether all is below a number that nothing else is small against.
  __device__ bool gone(bool momentum_alone) const {
    constexpr A least = std::is_same_v<A, float> ? 1e-30 : 1e-200;
    bool above = false;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      // Written so that NaN is above.
      above |= !(fabs(m[i]) <= least) || !(momentum_alone || fabs(w[i]) <= least);
    }
    return !above;
  }
};

// One step, its gradients in `grad`.
template <typename T, typename S, typename A, int n>
__device__ void make_step(const Adam<T, S>& a, const double* step, const A (&grad)[n],
                          Elements<A, n>& e) {
  const A size = step[kSize], root = step[kRoot], eps = a.eps;
  const A new1 = 1 - a.beta1, new2 = 1 - a.beta2;
  const A decay = a.decoupled ? 0 : step[kDecay], kept = a.decoupled ? step[kDecay] : 1;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const A g = grad[i] + decay * e.w[i];
    e.m[i] += (g - e.m[i]) * new1;
    // Not as beta2 * v, whose rounding is the same at every step and adds up.
    e.v[i] += (g * g - e.v[i]) * new2;
    e.w[i] = e.w[i] * kept - size * e.m[i] / (sqrt(e.v[i]) * root + eps);
  }
}

// The value at `size`, in units of the growth, of a series from its first column.
template <typename A>
__device__ A value(const double* c, A size) {
  A sum = c[kSeries - 1];
#pragma unroll
  for (int p = kSeries - 2; p >= 0; --p) sum = static_cast<A>(c[p]) + size * sum;
  return sum;
}

// Steps 1 .. `to` of the table with L2 alone of weights that no gradient has touched: whether they are
// such, m and v zero, and small enough. A weight that is zero stays, whatever v is.
template <typename T, typename S, typename A, int n>
__device__ bool new_row(const Adam<T, S>& a, int to, Elements<A, n>& e) {
  const double* line = a.steps + to * kColumns;
  const A growth = line[kGrowth];
  bool known = growth < A(kUnknown);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    known = known && e.m[i] == 0 && (e.v[i] == 0 || e.w[i] == 0) &&
            fabs(e.w[i]) * growth <= A(kConverged);
  }
  if (!known) return false;
  const A left = exp2(a.log2 * static_cast<double>(to));
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const A w = e.w[i], size = fabs(w) * growth;
    e.w[i] = w * value(line + kNew, size);
    e.m[i] = w * value(line + kNew + kSeries, size);
    e.v[i] = e.v[i] * left + w * w * value(line + kNew + 2 * kSeries, size);
  }
  return true;
}

// Steps `from` + 1 .. `to`, lines of the table, with gradients decay * w.
template <typename T, typename S, typename A, int n>
__device__ void replay(const Adam<T, S>& a, int from, int to, Elements<A, n>& e) {
  const A none[n] = {};
  // float64 wants more digits than the series have.
  if constexpr (std::is_same_v<A, float>) {
    if (from == 0 && new_row(a, to, e)) return;
  }
  for (int t = from; t < to;) {
    if ((t % kLook == 0 || t == from) && e.gone(false)) {
      const A left = exp2(a.log2 * static_cast<double>(to - t));
#pragma unroll
      for (int i = 0; i < n; ++i) {
        e.w[i] = e.m[i] = 0;
        e.v[i] *= left;
      }
      return;
    }
    make_step(a, a.steps + ++t * kColumns, none, e);
  }
}

// Steps `from` + 1 .. `to` without any gradient, at once.
template <typename T, typename S, typename A, int n>
__device__ void coast(const Adam<T, S>& a, int from, int to, Elements<A, n>& e) {
  const double* start = a.steps + from * kColumns;
  const double* raw = start + kMoments;
  const A eps = a.eps;
  // What w loses, over m, as of line `counted`; from there on it decays as w does.
  A total[n] = {};
  const double* counted = start;
  if (!e.gone(true)) {  // else never trained, or long ago
    const double weight = raw[0] != 0 ? raw[0] : 1, over = 1 / weight;
    const double d = raw[1] * over, n2 = raw[2] * over, n3 = raw[3] * over;
    const double n4 = raw[4] * over, n5 = raw[5] * over, n6 = raw[6] * over;
    const double d2 = d * d, d3 = d2 * d;
    const double mean = a.root2 * start[kColumns + kRoot] + d, cube = mean * mean * mean;
    const double c6 = n6 - 6 * d * n5 + 15 * d2 * n4 - 20 * d3 * n3 + 15 * d2 * d2 * n2 - 5 * d3 * d3;
    constexpr double most = std::is_same_v<A, float> ? 1e-7 : 1e-11;
    if (a.grad == nullptr && raw[0] != 0 && fabs(c6) <= most * cube * cube) {
      const A c2 = n2 - d2, c3 = n3 - 3 * d * n2 + 2 * d3;
      const A c4 = n4 - 4 * d * n3 + 6 * d2 * n2 - 3 * d2 * d2;
      const A c5 = n5 - 5 * d * n4 + 10 * d2 * n3 - 10 * d3 * n2 + 4 * d2 * d3;
      const A last = c6, x = mean;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const A s = sqrt(e.v[i]), f = 1 / (s * x + eps), h = s * f;
        total[i] = static_cast<A>(weight) * f *
                   (1 + h * h * (c2 - h * (c3 - h * (c4 - h * (c5 - h * last)))));
      }
    } else {
      double momentum = a.beta1, second = a.root2;
      for (int t = from + 1; t <= to && momentum > kNegligibleMomentum; ++t) {
        const double* step = a.steps + t * kColumns;
        const A part = step[kSize] * momentum, x = second * step[kRoot];
        const A decay = a.decoupled ? step[kDecay] : 1;
#pragma unroll
        for (int i = 0; i < n; ++i) total[i] = decay * total[i] + part / (sqrt(e.v[i]) * x + eps);
        momentum *= a.beta1;
        second *= a.root2;
        counted = step;
      }
    }
  }
  const double* end = a.steps + to * kColumns;
  const A kept = end[kLeft] / start[kLeft], left = end[kLeft] / counted[kLeft];
#pragma unroll
  for (int i = 0; i < n; ++i) e.w[i] = kept * e.w[i] - left * e.m[i] * total[i];
  // After w, for want of registers.
  const double missed = to - from;
  const A left1 = exp2(a.log1 * missed), left2 = exp2(a.log2 * missed);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    e.m[i] *= left1;
    e.v[i] *= left2;
  }
}

// Threads are (columns, rows).
template <typename T, typename S, int n, bool l2>
__global__ void __launch_bounds__(kThreads, kBlocks<T, l2>)
    adam_kernel(const __grid_constant__ Adam<T, S> a) {
  using A = Sum<T>;
  const int64_t u = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t base = a.clock[0], now = a.clock[1];
  const int64_t row = u < a.count ? a.rows ? a.rows[u] : u : -1;
  // Row 0 is padding where rows are named: a plan repeats it.
  const bool known = row >= 0 && row < a.size && !(a.rows && row == 0) && now - base < a.lines;
  const int newest = known ? a.last[row] : 0;
  int c = threadIdx.x * n;
  Elements<A, n> e;
  A grad[n] = {};
  const auto fetch = [&] {
    if (!known || c >= a.width) return;
    const int64_t at = row * a.width + c;
    read(a.weight + at, e.w);
    read(a.exp_avg + at, e.m);
    read(a.exp_avg_sq + at, e.v);
    if (a.grad) read(a.grad + u * a.width + c, grad);
  };
  fetch();          // while `newest` is on its way, which nothing uses before the barrier
  __syncthreads();  // all threads of the row have read when it made its last step
  // Lines of the table of steps.
  const int line = now - base, made = newest - base;
  const int from = made < 0 ? 0 : made, to = a.grad ? line - 1 : line;
  if (!known || from >= line) return;
  if (threadIdx.x == 0) a.last[row] = static_cast<int32_t>(now);
  for (; c < a.width; c += blockDim.x * n, fetch()) {
    if (from < to) {
      if constexpr (l2) {
        replay(a, from, to, e);
      } else {
        coast(a, from, to, e);
      }
    }
    if (a.grad) make_step(a, a.steps + line * kColumns, grad, e);
    const int64_t at = row * a.width + c;
    store(e.w, a.weight + at);
    store(e.m, a.exp_avg + at);
    store(e.v, a.exp_avg_sq + at);
  }
}

template <typename T, typename S, bool l2>
void run(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& last,
         const Rows& rows, const Tensor& steps, const Tensor& clock, double beta1, double beta2,
         double eps, bool decoupled) {
  Adam<T, S> a{};
  a.weight = static_cast<T*>(weight.mutable_data_ptr());
  a.exp_avg = static_cast<S*>(exp_avg.mutable_data_ptr());
  a.exp_avg_sq = static_cast<Sum<T>*>(exp_avg_sq.mutable_data_ptr());
  a.last = static_cast<int32_t*>(last.mutable_data_ptr());
  a.rows = rows.named();
  a.grad = rows.grad<T>();
  a.steps = static_cast<const double*>(steps.const_data_ptr());
  a.clock = static_cast<const int64_t*>(clock.const_data_ptr());
  a.size = weight.size(0);
  a.count = rows.count;
  a.lines = steps.size(0);
  a.width = static_cast<int>(weight.size(1));
  a.beta1 = beta1, a.beta2 = beta2, a.root2 = std::sqrt(beta2), a.eps = eps;
  a.log1 = std::log2(beta1), a.log2 = std::log2(beta2);
  a.decoupled = decoupled;
  constexpr int wide = 16 / sizeof(Sum<T>);
  const bool vectors =
      a.width % wide == 0 &&
      aligned({a.weight, a.grad}, wide * sizeof(T)) &&
      aligned({a.exp_avg}, wide * sizeof(S)) && aligned({a.exp_avg_sq}, 16);
  const auto [grid, block] = row_shape(rows.count, vectors ? a.width / wide : a.width, kThreads);
  launch("adam_rows", vectors ? adam_kernel<T, S, wide, l2> : adam_kernel<T, S, 1, l2>, grid, block,
         0, weight, a);
}

void adam_rows(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& last, const std::optional<Tensor>& rows_in,
               const std::optional<Tensor>& grad, const Tensor& steps_in,
               const Tensor& clock_in, double beta1, double beta2, double eps, bool decoupled,
               bool l2) {
  const Rows rows("adam_rows", weight, rows_in, grad);
  const int64_t size = weight.size(0), width = weight.size(1);
  for (const Tensor* state : {&exp_avg, &exp_avg_sq}) {
    STEM_FAST_CHECK(state->dim() == 2 && state->size(0) == size && state->size(1) == width,
                    "adam_rows: exp_avg and exp_avg_sq must be as weight, [", size, ", ", width,
                    "]");
  }
  STEM_FAST_CHECK(exp_avg_sq.scalar_type() == (weight.scalar_type() == ScalarType::Double
                                                   ? ScalarType::Double
                                                   : ScalarType::Float),
                  "adam_rows: exp_avg_sq must be float32, of a float64 weight float64");
  STEM_FAST_CHECK(exp_avg.is_contiguous() && exp_avg_sq.is_contiguous(),
                  "adam_rows: what is changed in place must be contiguous");
  check_steps("adam_rows", weight, last, steps_in, kColumns, clock_in);
  check_device("adam_rows", weight, {exp_avg, exp_avg_sq});
  if (rows.count == 0 || width == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const Tensor steps = torch::stable::contiguous(steps_in);
  const Tensor clock = torch::stable::contiguous(clock_in);
  for_type(weight.scalar_type(), "adam_rows", [&](auto zero) {
    using T = decltype(zero);
    const ScalarType state = exp_avg.scalar_type();
    const auto with = [&](auto kind) {
      const auto call = l2 ? run<T, decltype(kind), true> : run<T, decltype(kind), false>;
      call(weight, exp_avg, exp_avg_sq, last, rows, steps, clock, beta1, beta2, eps, decoupled);
    };
    if (state == ScalarType::BFloat16) return with(BFloat16());
    if (state == weight.scalar_type()) return with(T());
    STEM_FAST_CHECK(state == ScalarType::Float,
                    "adam_rows: exp_avg must be bfloat16, float32 or of weight's type");
    with(float());
  });
}

}  // namespace
}  // namespace stem_fast

// The schema is defined in stem_fast/ops/adam.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CUDA, m) { m.impl("adam_rows", TORCH_BOX(&stem_fast::adam_rows)); }
