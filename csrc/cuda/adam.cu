// Adam of a batch's rows on CUDA, with the steps that they missed: one read and one write of a row's
// weight and state. See reference.adam_rows for the arguments, stem_fast/optim.py for the table of
// steps and the mathematics.
//
// Every element is one thread's, so results repeat bit for bit; nothing waits for the device.

#include <cmath>
#include <optional>

#include "common.cuh"

namespace stem_fast {
namespace {

constexpr int kThreads = 256;
// Columns of the table of steps.
enum Column { kSize, kRoot, kDecay, kLeft, kMoments, kColumns = kMoments + 7 };
// Steps of a replay between two looks at whether anything still moves.
constexpr int kLook = 32;
// Momentum of which so little is left moves nothing: 2^-60.
constexpr double kSpent = 0x1p-60;

template <typename T, typename S>
struct Adam {
  T* weight;
  S *exp_avg, *exp_avg_sq;
  int32_t* last;
  const int64_t* rows;  // nullptr: all
  const T* grad;        // nullptr: none
  const double* steps;
  const int64_t* clock;
  int64_t count, size;  // of rows to handle, of the table
  int64_t lines;
  int width;
  double beta1, beta2, root2, eps;
  bool decoupled, l2;
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
      above |= fabs(m[i]) > least || (!momentum_alone && fabs(w[i]) > least);
    }
    return !above;
  }
};

// One step, its gradients in `grad`.
template <typename T, typename S, typename A, int n>
__device__ void make_step(const Adam<T, S>& a, const double* step, const A (&grad)[n],
                          Elements<A, n>& e) {
  const A size = step[kSize], root = step[kRoot], beta2 = a.beta2, eps = a.eps;
  const A new1 = 1 - a.beta1, new2 = 1 - a.beta2;
  const A decay = a.decoupled ? 0 : step[kDecay], kept = a.decoupled ? step[kDecay] : 1;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const A g = grad[i] + decay * e.w[i];
    e.m[i] += (g - e.m[i]) * new1;
    e.v[i] = e.v[i] * beta2 + new2 * g * g;
    e.w[i] = e.w[i] * kept - size * e.m[i] / (sqrt(e.v[i]) * root + eps);
  }
}

// Steps `from` + 1 .. `to`, lines of the table, with gradients decay * w.
template <typename T, typename S, typename A, int n>
__device__ void replay(const Adam<T, S>& a, int64_t from, int64_t to, Elements<A, n>& e) {
  const A none[n] = {};
  for (int64_t t = from + 1; t <= to; ++t) {
    // L2 alone moves them, and there may be nothing left to pull.
    if ((t - from) % kLook == 0 && e.gone(false)) {
      const A left = pow(a.beta2, static_cast<double>(to - t + 1));
#pragma unroll
      for (int i = 0; i < n; ++i) {
        e.w[i] = e.m[i] = 0;
        e.v[i] *= left;
      }
      return;
    }
    make_step(a, a.steps + t * kColumns, none, e);
  }
}

// Steps `from` + 1 .. `to` without any gradient, at once.
template <typename T, typename S, typename A, int n>
__device__ void coast(const Adam<T, S>& a, int64_t from, int64_t to, Elements<A, n>& e) {
  const double* start = a.steps + from * kColumns;
  const double* raw = start + kMoments;
  const A eps = a.eps;
  A total[n] = {};
  if (!e.gone(true)) {  // else never trained, or long ago
    const double weight = raw[0] != 0 ? raw[0] : 1;
    const double d = raw[1] / weight, n2 = raw[2] / weight, n3 = raw[3] / weight;
    const double n4 = raw[4] / weight, n5 = raw[5] / weight, n6 = raw[6] / weight;
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
      for (int64_t t = from + 1; t <= to && momentum > kSpent; ++t) {
        const double* step = a.steps + t * kColumns;
        const A part = step[kSize] * momentum * start[kLeft] / step[kLeft];
        const A x = second * step[kRoot];
#pragma unroll
        for (int i = 0; i < n; ++i) total[i] += part / (sqrt(e.v[i]) * x + eps);
        momentum *= a.beta1;
        second *= a.root2;
      }
    }
  }
  const double missed = static_cast<double>(to - from);
  const A left1 = pow(a.beta1, missed), left2 = pow(a.beta2, missed);
  const A kept = a.steps[to * kColumns + kLeft] / start[kLeft];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    e.w[i] = kept * (e.w[i] - e.m[i] * total[i]);
    e.m[i] *= left1;
    e.v[i] *= left2;
  }
}

template <int n, typename T, typename A>
__device__ void read(const T* from, A (&to)[n]) {
  T values[n];
  load(from, values);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = static_cast<A>(values[i]);
}

// Threads are (columns, rows).
template <typename T, typename S, int n>
__global__ void __launch_bounds__(kThreads) adam_kernel(const __grid_constant__ Adam<T, S> a) {
  using A = Sum<T>;
  const int64_t u = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t base = a.clock[0], now = a.clock[1], due = a.grad ? now - 1 : now;
  const int64_t row = u < a.count ? a.rows ? a.rows[u] : u : -1;
  // Row 0 is padding where rows are named: a plan repeats it.
  const bool known = row >= 0 && row < a.size && !(a.rows && row == 0) && now - base < a.lines;
  const int64_t newest = known ? a.last[row] : now, made = newest < base ? base : newest;
  if (made < now) {
    for (int c = threadIdx.x * n; c < a.width; c += blockDim.x * n) {
      const int64_t at = row * a.width + c;
      Elements<A, n> e;
      read(a.weight + at, e.w);
      read(a.exp_avg + at, e.m);
      read(a.exp_avg_sq + at, e.v);
      if (made < due) {
        if (a.l2) {
          replay(a, made - base, due - base, e);
        } else {
          coast(a, made - base, due - base, e);
        }
      }
      if (a.grad) {
        A grad[n];
        read(a.grad + u * a.width + c, grad);
        make_step(a, a.steps + (now - base) * kColumns, grad, e);
      }
      store(e.w, a.weight + at);
      store(e.m, a.exp_avg + at);
      store(e.v, a.exp_avg_sq + at);
    }
  }
  __syncthreads();  // all threads of the row have read when it made its last step
  if (made < now && threadIdx.x == 0) a.last[row] = static_cast<int32_t>(now);
}

template <typename T, typename S>
void run(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& last,
         const std::optional<Tensor>& rows, const std::optional<Tensor>& grad, const Tensor& steps,
         const Tensor& clock, double beta1, double beta2, double eps, bool decoupled, bool l2) {
  Adam<T, S> a{};
  a.weight = static_cast<T*>(weight.mutable_data_ptr());
  a.exp_avg = static_cast<S*>(exp_avg.mutable_data_ptr());
  a.exp_avg_sq = static_cast<S*>(exp_avg_sq.mutable_data_ptr());
  a.last = static_cast<int32_t*>(last.mutable_data_ptr());
  if (rows) a.rows = static_cast<const int64_t*>(rows->const_data_ptr());
  if (grad) a.grad = static_cast<const T*>(grad->const_data_ptr());
  a.steps = static_cast<const double*>(steps.const_data_ptr());
  a.clock = static_cast<const int64_t*>(clock.const_data_ptr());
  a.size = weight.size(0);
  a.count = rows ? rows->size(0) : a.size;
  a.lines = steps.size(0);
  a.width = static_cast<int>(weight.size(1));
  a.beta1 = beta1, a.beta2 = beta2, a.root2 = std::sqrt(beta2), a.eps = eps;
  a.decoupled = decoupled, a.l2 = l2;
  constexpr int wide = 16 / sizeof(Sum<T>);
  const bool vectors =
      a.width % wide == 0 &&
      aligned({a.weight, a.grad}, wide * sizeof(T)) &&
      aligned({a.exp_avg, a.exp_avg_sq}, wide * sizeof(S));
  const int elements = vectors ? a.width / wide : a.width;
  const int threads_x = elements < kThreads ? elements : kThreads;
  const dim3 block(threads_x, kThreads / threads_x);
  const dim3 grid((a.count + block.y - 1) / block.y);
  launch("adam_rows", vectors ? adam_kernel<T, S, wide> : adam_kernel<T, S, 1>, grid, block, 0,
         weight, a);
}

void adam_rows(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& last, const std::optional<Tensor>& rows_in,
               const std::optional<Tensor>& grad_in, const Tensor& steps_in, const Tensor& clock_in,
               double beta1, double beta2, double eps, bool decoupled, bool l2) {
  STD_TORCH_CHECK(weight.dim() == 2, "adam_rows: weight must be [R, W]");
  const int64_t size = weight.size(0), width = weight.size(1);
  for (const Tensor* state : {&exp_avg, &exp_avg_sq}) {
    STD_TORCH_CHECK(state->dim() == 2 && state->size(0) == size && state->size(1) == width &&
                        state->scalar_type() == exp_avg.scalar_type(),
                    "adam_rows: exp_avg and exp_avg_sq must be as weight, [", size, ", ", width,
                    "], of one type");
  }
  STD_TORCH_CHECK(last.dim() == 1 && last.size(0) == size && last.scalar_type() == ScalarType::Int,
                  "adam_rows: last must be int32 [", size, "]");
  STD_TORCH_CHECK(weight.is_contiguous() && exp_avg.is_contiguous() && exp_avg_sq.is_contiguous() &&
                      last.is_contiguous(),
                  "adam_rows: what is changed in place must be contiguous");
  STD_TORCH_CHECK(steps_in.dim() == 2 && steps_in.size(1) == kColumns &&
                      steps_in.scalar_type() == ScalarType::Double && clock_in.numel() == 2 &&
                      clock_in.scalar_type() == ScalarType::Long,
                  "adam_rows: steps must be float64 [N, ", static_cast<int64_t>(kColumns),
                  "] and clock int64 [2]");
  STD_TORCH_CHECK(!rows_in || (rows_in->dim() == 1 && rows_in->scalar_type() == ScalarType::Long),
                  "adam_rows: rows must be int64 [U]");
  const int64_t count = rows_in ? rows_in->size(0) : size;
  STD_TORCH_CHECK(!grad_in || (grad_in->dim() == 2 && grad_in->size(0) == count &&
                               grad_in->size(1) == width &&
                               grad_in->scalar_type() == weight.scalar_type()),
                  "adam_rows: grad must be [", count, ", ", width, "] of weight's type");
  check_device("adam_rows", weight, {exp_avg, exp_avg_sq, last, steps_in, clock_in});
  if (rows_in) check_device("adam_rows", weight, {*rows_in});
  if (grad_in) check_device("adam_rows", weight, {*grad_in});
  if (count == 0 || width == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const Tensor steps = torch::stable::contiguous(steps_in);
  const Tensor clock = torch::stable::contiguous(clock_in);
  std::optional<Tensor> rows, grad;
  if (rows_in) rows = torch::stable::contiguous(*rows_in);
  if (grad_in) grad = torch::stable::contiguous(*grad_in);
  for_type(weight.scalar_type(), "adam_rows", [&](auto zero) {
    using T = decltype(zero);
    const ScalarType state = exp_avg.scalar_type();
    const auto with = [&](auto kind) {
      run<T, decltype(kind)>(weight, exp_avg, exp_avg_sq, last, rows, grad, steps, clock, beta1,
                             beta2, eps, decoupled, l2);
    };
    if (state == ScalarType::BFloat16) return with(BFloat16());
    if (state == weight.scalar_type()) return with(T());
    STD_TORCH_CHECK(state == ScalarType::Float,
                    "adam_rows: the state must be bfloat16, float32 or of weight's type");
    with(float());
  });
}

}  // namespace
}  // namespace stem_fast

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CUDA, m) { m.impl("adam_rows", TORCH_BOX(&stem_fast::adam_rows)); }
