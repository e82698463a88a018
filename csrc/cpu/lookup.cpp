// Multi-table embedding lookup on CPU: one contiguous read an id, all spaces at once.
//
//   weight  [R, G*D]  float32, float64, bfloat16 or float16 (rows are only copied)
//   ids     [B, F]    int32 or int64
//   offsets [F]       int64, first row of each field
//   out     [G, B, F*D]

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows a thread copies before another is worth waking.
constexpr int64_t kGrain = 256;

template <typename Id>
void gather(const char* weight, const Id* ids, const int64_t* offsets, char* out, int64_t rows,
            int64_t batch, int64_t fields, int64_t spaces, size_t chunk) {
  const size_t row_bytes = spaces * chunk;
  // An exception inside parallel_for would lose its message.
  std::atomic<int64_t> bad{-1};
  torch::stable::parallel_for(0, batch, kGrain / (fields + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t f = 0; f < fields; ++f) {
        const int64_t row = offsets[f] + static_cast<int64_t>(ids[b * fields + f]);
        if (row < 0 || row >= rows) {
          bad = b * fields + f;
          return;
        }
        const char* source = weight + row * row_bytes;
        for (int64_t g = 0; g < spaces; ++g) {
          std::memcpy(out + ((g * batch + b) * fields + f) * chunk, source + g * chunk, chunk);
        }
      }
    }
  });
  const int64_t at = bad;
  STD_TORCH_CHECK(at < 0, "lookup: id ", ids[at], " of field ", at % fields, " at row ", at / fields,
                  " is outside the arena of ", rows, " rows");
}

Tensor lookup(const Tensor& weight_in, const Tensor& ids_in, const Tensor& offsets_in,
              int64_t spaces) {
  STD_TORCH_CHECK(weight_in.dim() == 2 && spaces > 0 && weight_in.size(1) % spaces == 0,
                  "lookup: weight must be [R, G*D] with G = ", spaces);
  STD_TORCH_CHECK(ids_in.dim() == 2 && offsets_in.dim() == 1 &&
                      offsets_in.size(0) == ids_in.size(1),
                  "lookup: ids must be [B, F] and offsets [F]");
  STD_TORCH_CHECK(offsets_in.scalar_type() == ScalarType::Long, "lookup: offsets must be int64");
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const int64_t rows = weight.size(0), width = weight.size(1) / spaces;
  const int64_t batch = ids.size(0), fields = ids.size(1);
  Tensor out = torch::stable::new_empty(weight, {spaces, batch, fields * width});

  const auto run = [&](auto* typed_ids) {
    gather(static_cast<const char*>(weight.const_data_ptr()), typed_ids,
           static_cast<const int64_t*>(offsets.const_data_ptr()),
           static_cast<char*>(out.mutable_data_ptr()), rows, batch, fields, spaces,
           static_cast<size_t>(width) * weight.element_size());
  };
  if (ids.scalar_type() == ScalarType::Int) {
    run(static_cast<const int32_t*>(ids.const_data_ptr()));
  } else {
    STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "lookup: ids must be int32 or int64");
    run(static_cast<const int64_t*>(ids.const_data_ptr()));
  }
  return out;
}

}  // namespace

// The schema is defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) { m.impl("lookup", TORCH_BOX(&lookup)); }
