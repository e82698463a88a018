// Adagrad of a batch's rows on CUDA: one read and one write of a row's weight and sum. See
// reference.adagrad_rows for the arguments.
//
// A row belongs to the threads of one block, which add in a fixed order, so results repeat bit for
// bit; nothing waits for the device.

#include <cmath>
#include <optional>

#include "common.cuh"
#include "rows.cuh"

namespace stem_fast {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Adagrad {
  T* weight;
  Sum<T>* sum;
  const int64_t* rows;  // nullptr: all
  const T* grad;
  const double* options;  // lr, weight_decay
  int64_t count, size;    // of rows to handle, of the table
  int width;
  double eps;
};

// n weights of the row at `at`, and their gradients at `from`, with L2.
template <int n, typename T, typename A>
__device__ void read_pair(const Adagrad<T>& a, int64_t at, int64_t from, A decay, A (&w)[n],
                          A (&g)[n]) {
  read(a.weight + at, w);
  read(a.grad + from, g);
#pragma unroll
  for (int i = 0; i < n; ++i) g[i] += decay * w[i];
}

// Threads are (columns, rows).
template <typename T, bool row_wise, int n>
__global__ void __launch_bounds__(kThreads) adagrad_kernel(const __grid_constant__ Adagrad<T> a) {
  using A = Sum<T>;
  const int64_t u = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t named = u < a.count ? a.rows ? a.rows[u] : u : -1;
  // Row 0 is padding where rows are named: a plan repeats it.
  const int64_t row = named < a.size && !(a.rows && named == 0) ? named : -1;
  const A lr = a.options[0], decay = a.options[1], eps = a.eps;
  const int start = row < 0 ? a.width : threadIdx.x * n;
  A w[n], g[n];
  A size = lr;
  if constexpr (row_wise) {
    __shared__ A parts[kThreads];
    A* of_row = parts + threadIdx.y * blockDim.x;
    A squares = 0;
    for (int c = start; c < a.width; c += blockDim.x * n) {
      read_pair(a, row * a.width + c, u * a.width + c, decay, w, g);
#pragma unroll
      for (int i = 0; i < n; ++i) squares += g[i] * g[i];
    }
    of_row[threadIdx.x] = squares;
    const A before = row < 0 ? A(0) : a.sum[row];
    __syncthreads();
    A total = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x); ++i) total += of_row[i];
    total = before + total / a.width;
    size = lr / (sqrt(total) + eps);
    if (row >= 0 && threadIdx.x == 0) a.sum[row] = total;
  }
  for (int c = start; c < a.width; c += blockDim.x * n) {
    const int64_t at = row * a.width + c;
    // What a row-wise step has read above is in the cache; kept in registers, float64 spills.
    read_pair(a, at, u * a.width + c, decay, w, g);
    if constexpr (row_wise) {
#pragma unroll
      for (int i = 0; i < n; ++i) w[i] -= size * g[i];
    } else {
      A sum[n];
      read(a.sum + at, sum);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        sum[i] += g[i] * g[i];
        w[i] -= lr * g[i] / (sqrt(sum[i]) + eps);
      }
      store(sum, a.sum + at);
    }
    store(w, a.weight + at);
  }
}

template <typename T, bool row_wise>
void run(const Tensor& weight, const Tensor& sum, const Rows& rows, const Tensor& options,
         double eps) {
  Adagrad<T> a{};
  a.weight = static_cast<T*>(weight.mutable_data_ptr());
  a.sum = static_cast<Sum<T>*>(sum.mutable_data_ptr());
  a.rows = rows.named();
  a.grad = rows.grad<T>();
  a.options = static_cast<const double*>(options.const_data_ptr());
  a.size = weight.size(0);
  a.count = rows.count;
  a.width = static_cast<int>(weight.size(1));
  a.eps = eps;
  constexpr int wide = 16 / sizeof(Sum<T>);
  const bool vectors = a.width % wide == 0 && aligned({a.weight, a.grad}, wide * sizeof(T)) &&
                       (row_wise || aligned({a.sum}, 16));
  const auto [grid, block] = row_shape(rows.count, vectors ? a.width / wide : a.width, kThreads);
  const auto kernel = vectors ? adagrad_kernel<T, row_wise, wide> : adagrad_kernel<T, row_wise, 1>;
  launch("adagrad_rows", kernel, grid, block, 0, weight, a);
}

void adagrad_rows(const Tensor& weight, const Tensor& sum, const std::optional<Tensor>& rows_in,
                  const Tensor& grad, const Tensor& options_in, double eps) {
  const Rows rows("adagrad_rows", weight, rows_in, grad);
  const int64_t size = weight.size(0), width = weight.size(1);
  STEM_FAST_CHECK((sum.dim() == 1 || (sum.dim() == 2 && sum.size(1) == width)) &&
                      sum.size(0) == size,
                  "adagrad_rows: sum must be [", size, "] or [", size, ", ", width, "]");
  check_state("adagrad_rows", "sum", sum, weight);
  STEM_FAST_CHECK(options_in.numel() == 2 && options_in.scalar_type() == ScalarType::Double,
                  "adagrad_rows: options must be float64 [2]");
  check_device("adagrad_rows", weight, {options_in});
  if (rows.count == 0 || width == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const Tensor options = torch::stable::contiguous(options_in);
  for_type(weight.scalar_type(), "adagrad_rows", [&](auto zero) {
    using T = decltype(zero);
    (sum.dim() == 1 ? run<T, true> : run<T, false>)(weight, sum, rows, options, eps);
  });
}

}  // namespace
}  // namespace stem_fast

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CUDA, m) {
  m.impl("adagrad_rows", TORCH_BOX(&stem_fast::adagrad_rows));
}
