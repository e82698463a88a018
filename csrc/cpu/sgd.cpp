// SGD of a batch's rows on CPU, with the steps that they missed: one read and one write of a row's
// weight and momentum. See reference.sgd_rows for the arguments, optim.Products for the table of
// steps.
//
// Rows are independent, so the results are the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "lanes.h"
#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of the table of steps.
enum Column { kRate, kMomentum, kDecay, kProduct, kColumns = kProduct + 4 };

struct Job {
  Table weight;
  const Table* momentum_buffer;  // nullptr: none
  int32_t* last;
  const int64_t* rows;  // nullptr: all
  const Table* grad;    // nullptr: none
  const double* steps;
  int64_t base, now, width;
};

// What steps without a gradient do to (w, b), w in difference to what it was.
struct Product {
  double ww = 1, wb = 0, bw = 0, bb = 1;

  // The steps after line `from` up to line `to`. A line ends at the next multiple of twice its
  // lowest bit, line 0 nowhere.
  Product(const double* steps, int64_t from, int64_t to) {
    while (from < to) {
      const double* p = steps + from * kColumns + kProduct;
      const double new_ww = p[0] * ww + p[1] * bw, new_wb = p[0] * wb + p[1] * bb;
      bw = p[2] * ww + p[3] * bw, bb = p[2] * wb + p[3] * bb;
      ww = new_ww, wb = new_wb;
      from = from ? from + (from & -from) : to;
    }
    ww -= 1;
  }
};

template <typename A>
INLINE void run(const Job& job, int64_t begin, int64_t end) {
  std::vector<A> space(3 * job.width);
  A *__restrict w = space.data(), *__restrict b = w + job.width, *__restrict g = b + job.width;
  const double* newest = job.steps + (job.now - job.base) * kColumns;
  // What a gradient adds to w and to b.
  const A rate = job.grad ? -newest[kRate] : 0, one = job.grad && newest[kMomentum] != 0;
  for_rows(job.rows, begin, end, {&job.weight, job.momentum_buffer},
           [&](int64_t u, int64_t at) INLINE_LAMBDA {
    const int64_t made = std::max<int64_t>(job.last[at], job.base);
    if (made >= job.now) return;
    const Product p(job.steps, made - job.base, job.now - job.base);
    const A ww = p.ww, wb = p.wb, bw = p.bw, bb = p.bb;
    job.weight.read(at, w);
    if (job.grad) job.grad->read(u, g);
    if (job.momentum_buffer) {
      job.momentum_buffer->read(at, b);
      for (int64_t i = 0; i < job.width; ++i) {
        const A before = w[i];
        w[i] += ww * before + wb * b[i] + rate * g[i];
        b[i] = bw * before + bb * b[i] + one * g[i];
      }
      job.momentum_buffer->write(at, b);
    } else {
      for (int64_t i = 0; i < job.width; ++i) w[i] += ww * w[i] + rate * g[i];
    }
    job.weight.write(at, w);
    job.last[at] = static_cast<int32_t>(job.now);
  });
}

// A template cannot be multiversioned, so each type has its entry.
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, float) {
  run<float>(job, begin, end);
}
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, double) {
  run<double>(job, begin, end);
}

void sgd_rows(const Tensor& weight, const std::optional<Tensor>& momentum_buffer,
              const Tensor& last, const std::optional<Tensor>& rows_in,
              const std::optional<Tensor>& grad_in, const Tensor& steps_in,
              const Tensor& clock) {
  const Rows rows("sgd_rows", weight, rows_in, grad_in);
  const int64_t width = weight.size(1);
  if (momentum_buffer) check_state("sgd_rows", "momentum_buffer", weight, *momentum_buffer);
  const Steps steps("sgd_rows", weight, last, steps_in, kColumns, clock);
  std::optional<Table> buffer;
  if (momentum_buffer) buffer.emplace(*momentum_buffer, width);
  const Job job{{weight, width}, buffer ? &*buffer : nullptr, steps.last, rows.named(),
                rows.grad(), steps.table(), steps.base, steps.now, width};
  for_type(weight.scalar_type(), "sgd_rows", [&](auto zero) {
    torch::stable::parallel_for(0, rows.count, kGrain, [&](int64_t begin, int64_t end) {
      const FlushToZero mode;
      run_entry(job, begin, end, Sum<decltype(zero)>());
    });
  });
}

}  // namespace

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) { m.impl("sgd_rows", TORCH_BOX(&sgd_rows)); }
