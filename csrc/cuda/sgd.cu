// SGD of a batch's rows on CUDA, with the steps that they missed: one read and one write of a row's
// weight and momentum. See reference.sgd_rows for the arguments, optim.Products for the table of
// steps.
//
// Every element is one thread's, so results repeat bit for bit; nothing waits for the device.

#include <optional>

#include "common.cuh"
#include "rows.cuh"

namespace stem_fast {
namespace {

constexpr int kThreads = 256;
// Columns of the table of steps.
enum Column { kRate, kMomentum, kDecay, kProduct, kColumns = kProduct + 4 };

template <typename T>
struct Sgd {
  T* weight;
  Sum<T>* momentum_buffer;  // nullptr: none
  int32_t* last;
  const int64_t* rows;  // nullptr: all
  const T* grad;        // nullptr: none
  const double* steps;
  const int64_t* clock;
  int64_t count, size;  // of rows to handle, of the table
  int64_t lines;
  int width;
};

// Threads are (columns, rows).
template <typename T, int n>
__global__ void __launch_bounds__(kThreads) sgd_kernel(const __grid_constant__ Sgd<T> a) {
  using A = Sum<T>;
  const int64_t u = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t base = a.clock[0], now = a.clock[1], end = now - base;
  const int64_t row = u < a.count ? a.rows ? a.rows[u] : u : -1;
  // Row 0 is padding where rows are named: a plan repeats it.
  const bool known = row >= 0 && row < a.size && !(a.rows && row == 0) && end < a.lines;
  const int64_t newest = known ? a.last[row] : now, made = newest < base ? base : newest;
  if (made < now) {
    // What steps without a gradient do to (w, b).
    double ww = 1, wb = 0, bw = 0, bb = 1;
    for (int64_t line = made - base; line < end; line = line ? line + (line & -line) : end) {
      const double* p = a.steps + line * kColumns + kProduct;
      const double new_ww = p[0] * ww + p[1] * bw, new_wb = p[0] * wb + p[1] * bb;
      bw = p[2] * ww + p[3] * bw, bb = p[2] * wb + p[3] * bb;
      ww = new_ww, wb = new_wb;
    }
    const A change = ww - 1, to_w = wb, to_b = bw, kept = bb;
    // What a gradient adds to w and to b.
    const double* step = a.steps + end * kColumns;
    const A rate = a.grad ? -step[kRate] : 0, one = a.grad && step[kMomentum] != 0;
    for (int c = threadIdx.x * n; c < a.width; c += blockDim.x * n) {
      const int64_t at = row * a.width + c;
      A w[n], b[n] = {}, g[n] = {};
      read(a.weight + at, w);
      if (a.momentum_buffer) read(a.momentum_buffer + at, b);
      if (a.grad) read(a.grad + u * a.width + c, g);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const A before = w[i];
        w[i] += change * before + to_w * b[i] + rate * g[i];
        b[i] = to_b * before + kept * b[i] + one * g[i];
      }
      store(w, a.weight + at);
      if (a.momentum_buffer) store(b, a.momentum_buffer + at);
    }
  }
  __syncthreads();  // all threads of the row have read when it made its last step
  if (made < now && threadIdx.x == 0) a.last[row] = static_cast<int32_t>(now);
}

template <typename T>
void run(const Tensor& weight, const std::optional<Tensor>& momentum_buffer, const Tensor& last,
         const Rows& rows, const Tensor& steps, const Tensor& clock) {
  Sgd<T> a{};
  a.weight = static_cast<T*>(weight.mutable_data_ptr());
  if (momentum_buffer) {
    a.momentum_buffer = static_cast<Sum<T>*>(momentum_buffer->mutable_data_ptr());
  }
  a.last = static_cast<int32_t*>(last.mutable_data_ptr());
  a.rows = rows.named();
  a.grad = rows.grad<T>();
  a.steps = static_cast<const double*>(steps.const_data_ptr());
  a.clock = static_cast<const int64_t*>(clock.const_data_ptr());
  a.size = weight.size(0);
  a.count = rows.count;
  a.lines = steps.size(0);
  a.width = static_cast<int>(weight.size(1));
  constexpr int wide = 16 / sizeof(Sum<T>);
  const bool vectors = a.width % wide == 0 && aligned({a.weight, a.grad}, wide * sizeof(T)) &&
                       aligned({a.momentum_buffer}, 16);
  const auto [grid, block] = row_shape(rows.count, vectors ? a.width / wide : a.width, kThreads);
  launch("sgd_rows", vectors ? sgd_kernel<T, wide> : sgd_kernel<T, 1>, grid, block, 0, weight, a);
}

void sgd_rows(const Tensor& weight, const std::optional<Tensor>& momentum_buffer,
              const Tensor& last, const std::optional<Tensor>& rows_in,
              const std::optional<Tensor>& grad, const Tensor& steps_in, const Tensor& clock_in) {
  const Rows rows("sgd_rows", weight, rows_in, grad);
  const int64_t size = weight.size(0), width = weight.size(1);
  STEM_FAST_CHECK(!momentum_buffer || (momentum_buffer->dim() == 2 &&
                                       momentum_buffer->size(0) == size &&
                                       momentum_buffer->size(1) == width),
                  "sgd_rows: momentum_buffer must be as weight, [", size, ", ", width, "]");
  if (momentum_buffer) check_state("sgd_rows", "momentum_buffer", *momentum_buffer, weight);
  check_steps("sgd_rows", weight, last, steps_in, kColumns, clock_in);
  if (rows.count == 0 || width == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const Tensor steps = torch::stable::contiguous(steps_in);
  const Tensor clock = torch::stable::contiguous(clock_in);
  for_type(weight.scalar_type(), "sgd_rows", [&](auto zero) {
    run<decltype(zero)>(weight, momentum_buffer, last, rows, steps, clock);
  });
}

}  // namespace
}  // namespace stem_fast

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CUDA, m) {
  m.impl("sgd_rows", TORCH_BOX(&stem_fast::sgd_rows));
}
