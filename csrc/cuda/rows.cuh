// What the optimizers share that read and write a batch's rows of a table in place.

#pragma once

#include <optional>
#include <utility>

#include "common.cuh"

namespace stem_fast {

// Which rows of weight [R, W] an op handles, those named or all, and their gradients.
class Rows {
 public:
  int64_t count;

  Rows(const char* op, const Tensor& weight, const std::optional<Tensor>& rows,
       const std::optional<Tensor>& grad) {
    STEM_FAST_CHECK(weight.dim() == 2, op, ": weight must be [R, W]");
    STEM_FAST_CHECK(weight.is_contiguous(), op, ": what is changed in place must be contiguous");
    STEM_FAST_CHECK(!rows || (rows->dim() == 1 && rows->scalar_type() == ScalarType::Long), op,
                    ": rows must be int64 [U]");
    count = rows ? rows->size(0) : weight.size(0);
    STEM_FAST_CHECK(!grad || (grad->dim() == 2 && grad->size(0) == count &&
                              grad->size(1) == weight.size(1) &&
                              grad->scalar_type() == weight.scalar_type()),
                    op, ": grad must be [", count, ", ", weight.size(1), "] of weight's type");
    if (rows) check_device(op, weight, {*rows});
    if (grad) check_device(op, weight, {*grad});
    const DeviceGuard guard(weight.get_device_index());
    if (rows) rows_ = torch::stable::contiguous(*rows);
    if (grad) grad_ = torch::stable::contiguous(*grad);
  }

  // nullptr: all.
  const int64_t* named() const {
    return rows_ ? static_cast<const int64_t*>(rows_->const_data_ptr()) : nullptr;
  }
  // nullptr: none.
  template <typename T>
  const T* grad() const {
    return grad_ ? static_cast<const T*>(grad_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> rows_, grad_;
};

// Raises where an optimizer's state of weight is not of the type, place and memory that its kernels
// take.
inline void check_state(const char* op, const char* name, const Tensor& state,
                        const Tensor& weight) {
  const ScalarType type =
      weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STEM_FAST_CHECK(state.scalar_type() == type, op, ": ", name,
                  " must be float32, of a float64 weight float64");
  STEM_FAST_CHECK(state.is_contiguous(), op, ": what is changed in place must be contiguous");
  check_device(op, weight, {state});
}

// Raises where the steps that rows may have missed are not as the kernels take them.
inline void check_steps(const char* op, const Tensor& weight, const Tensor& last,
                        const Tensor& steps, int64_t columns, const Tensor& clock) {
  STEM_FAST_CHECK(last.dim() == 1 && last.size(0) == weight.size(0) &&
                      last.scalar_type() == ScalarType::Int,
                  op, ": last must be int32 [", weight.size(0), "]");
  STEM_FAST_CHECK(last.is_contiguous(), op, ": what is changed in place must be contiguous");
  STEM_FAST_CHECK(steps.dim() == 2 && steps.size(1) == columns &&
                      steps.scalar_type() == ScalarType::Double && clock.numel() == 2 &&
                      clock.scalar_type() == ScalarType::Long,
                  op, ": steps must be float64 [N, ", columns, "] and clock int64 [2]");
  check_device(op, weight, {last, steps, clock});
}

// (grid, block) for `rows`, each of `elements` that a thread handles; threads are (columns, rows).
inline std::pair<dim3, dim3> row_shape(int64_t rows, int elements, int threads) {
  const int columns = elements < threads ? elements : threads;
  const dim3 block(columns, threads / columns);
  return {dim3((rows + block.y - 1) / block.y), block};
}

}  // namespace stem_fast
