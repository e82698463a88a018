// What the optimizers share that read and write a batch's rows of a table in place.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "lanes.h"

// Rows a thread handles before another is worth waking.
constexpr int64_t kGrain = 64;

// A table of any float type, of which one row at a time is read and written in A.
struct Table {
  char* data;
  torch::headeronly::ScalarType type;
  int64_t width, item;

  Table(const torch::stable::Tensor& tensor, int64_t width)
      : data(static_cast<char*>(tensor.mutable_data_ptr())),
        type(tensor.scalar_type()),
        width(width),
        item(tensor.element_size()) {
    for_type(type, "a table", [](auto) {});
  }

  template <typename F>
  INLINE void typed(int64_t row, const F& run) const {
    void* at = data + row * width * item;
    using torch::headeronly::ScalarType;
    switch (type) {
      case ScalarType::Double: return run(static_cast<double*>(at));
      case ScalarType::Float: return run(static_cast<float*>(at));
      case ScalarType::BFloat16: return run(static_cast<torch::headeronly::BFloat16*>(at));
      default: return run(static_cast<torch::headeronly::Half*>(at));
    }
  }
  template <typename A>
  bool is() const {
    return type == (std::is_same_v<A, double> ? torch::headeronly::ScalarType::Double
                                              : torch::headeronly::ScalarType::Float);
  }
  // Of a table that is of A.
  template <typename A>
  INLINE A* row(int64_t at) const {
    return reinterpret_cast<A*>(data) + at * width;
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
    ::prefetch(data + row * width * item, width * item);
  }
};

// Raises for the first of `count` rows that is outside a table of `size`.
inline void check_rows(const char* op, const int64_t* rows, int64_t count, int64_t size) {
  for (int64_t u = 0; u < count; ++u) {
    STEM_FAST_CHECK(rows[u] >= 0 && rows[u] < size, op, ": row ", rows[u], " at ", u,
                    " is outside the table of ", size, " rows");
  }
}

// Which rows of weight [R, W] an op handles, those named or all, and their gradients.
class Rows {
 public:
  int64_t count;

  Rows(const char* op, const torch::stable::Tensor& weight,
       const std::optional<torch::stable::Tensor>& rows,
       const std::optional<torch::stable::Tensor>& grad) {
    STEM_FAST_CHECK(weight.dim() == 2, op, ": weight must be [R, W]");
    STEM_FAST_CHECK(weight.is_contiguous(), op, ": what is changed in place must be contiguous");
    for (const auto* each : {&weight, grad ? &*grad : &weight}) {
      for_type(each->scalar_type(), op, [](auto) {});
    }
    STEM_FAST_CHECK(!rows || (rows->dim() == 1 && rows->scalar_type() ==
                                                      torch::headeronly::ScalarType::Long),
                    op, ": rows must be int64 [U]");
    count = rows ? rows->numel() : weight.size(0);
    STEM_FAST_CHECK(!grad || (grad->dim() == 2 && grad->size(0) == count &&
                              grad->size(1) == weight.size(1)),
                    op, ": grad must be [", count, ", ", weight.size(1), "]");
    if (rows) {
      rows_ = torch::stable::contiguous(*rows);
      check_rows(op, named(), count, weight.size(0));
    }
    if (grad) {
      kept_ = torch::stable::contiguous(*grad);
      grad_.emplace(*kept_, weight.size(1));
    }
  }

  // nullptr: all.
  const int64_t* named() const {
    return rows_ ? static_cast<const int64_t*>(rows_->const_data_ptr()) : nullptr;
  }
  // nullptr: none.
  const Table* grad() const { return grad_ ? &*grad_ : nullptr; }

 private:
  std::optional<torch::stable::Tensor> rows_, kept_;
  std::optional<Table> grad_;
};

// Raises unless an optimizer's state is a table as weight.
inline void check_state(const char* op, const char* names, const torch::stable::Tensor& weight,
                        const torch::stable::Tensor& state) {
  STEM_FAST_CHECK(state.dim() == 2 && state.size(0) == weight.size(0) &&
                      state.size(1) == weight.size(1),
                  op, ": ", names, " must be as weight, [", weight.size(0), ", ", weight.size(1),
                  "]");
  STEM_FAST_CHECK(state.is_contiguous(), op, ": what is changed in place must be contiguous");
  for_type(state.scalar_type(), op, [](auto) {});
}

// The steps that rows may have missed, from a table with a line for each; the newest of every row.
class Steps {
 public:
  int32_t* last;
  int64_t base, now;

  Steps(const char* op, const torch::stable::Tensor& weight, const torch::stable::Tensor& newest,
        const torch::stable::Tensor& steps, int64_t columns, const torch::stable::Tensor& clock) {
    using torch::headeronly::ScalarType;
    STEM_FAST_CHECK(newest.dim() == 1 && newest.size(0) == weight.size(0) &&
                        newest.scalar_type() == ScalarType::Int,
                    op, ": last must be int32 [", weight.size(0), "]");
    STEM_FAST_CHECK(newest.is_contiguous(), op, ": what is changed in place must be contiguous");
    STEM_FAST_CHECK(steps.dim() == 2 && steps.size(1) == columns &&
                        steps.scalar_type() == ScalarType::Double && clock.numel() == 2 &&
                        clock.scalar_type() == ScalarType::Long,
                    op, ": steps must be float64 [N, ", columns, "] and clock int64 [2]");
    last = static_cast<int32_t*>(newest.mutable_data_ptr());
    steps_ = torch::stable::contiguous(steps);
    const torch::stable::Tensor times = torch::stable::contiguous(clock);
    const auto* time = static_cast<const int64_t*>(times.const_data_ptr());
    base = time[0], now = time[1];
    STEM_FAST_CHECK(base >= 0 && now >= base && now - base < steps.size(0), op, ": the table has ",
                    steps.size(0), " lines for steps ", base, " to ", now);
  }

  const double* table() const { return static_cast<const double*>(steps_->const_data_ptr()); }

 private:
  std::optional<torch::stable::Tensor> steps_;
};

// Calls run(u, row) for each but padding, its row of the tables (nullptr: none) on its way from
// memory.
template <typename F>
INLINE void for_rows(const int64_t* rows, int64_t begin, int64_t end,
                     std::initializer_list<const Table*> tables, const F& run) {
  for (int64_t u = begin; u < end; ++u) {
    if (const int64_t next = u + kAhead; next < end) {
      for (const Table* table : tables) {
        if (table) table->prefetch(rows ? rows[next] : next);
      }
    }
    const int64_t row = rows ? rows[u] : u;
    if (!rows || row != 0) run(u, row);
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
