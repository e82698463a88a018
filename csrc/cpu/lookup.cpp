// Multi-table embedding lookup on CPU: one contiguous read a row, all spaces and their sums at once;
// and its gradient for the rows of a batch alone, through the row plan.
//
//   weight  [R, G*D]       float64, float32, bfloat16 or float16; sums in float32 (float64)
//   ids     [B, F]         int32 or int64
//   offsets [F]            int64, first row of each field
//   bags    (rows [n], bounds [S, B+1], weights [n])   sequences, see stem_fast/reference/lookup.py
//   x       [G, B, (F+S)*D]
//   z       [K, B, (F+S)*D]
//
// Samples (forward) and rows (gradient) are independent and summed in a fixed order, so the results
// are the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "lanes.h"

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Slots a thread handles before another is worth waking.
constexpr int64_t kGrain = 256;

struct Sizes {
  int64_t rows, batch, fields, bags, spaces, dim;
  int64_t columns() const { return fields + bags; }
};

template <typename Id>
struct Bags {
  const Id* rows;
  const int64_t* bounds;  // [S, B+1]
  const double* weights;  // nullptr: all 1
  uint64_t mean;
  int64_t n;
};

// Sums over spaces, each a mask.
using Sums = std::vector<uint64_t>;

// to[d] = the sum of from[g * dim + d] over the spaces of the mask. `fixed` is dim or 0.
template <int fixed, typename S, typename T, typename A = Sum<T>>
INLINE void sum_spaces(const S* __restrict from, uint64_t mask, T* __restrict to, int64_t dim) {
  if constexpr (fixed) dim = fixed;
  constexpr int lanes = Lanes<A>::n;
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes) {
    typename Lanes<A>::type sum;
    load(from + std::countr_zero(mask) * dim + d, sum);
    for (uint64_t rest = mask & (mask - 1); rest; rest &= rest - 1) {
      typename Lanes<A>::type value;
      load(from + std::countr_zero(rest) * dim + d, value);
      sum += value;
    }
    store(sum, to + d);
  }
  for (; d < dim; ++d) {
    A sum = 0;
    for (uint64_t rest = mask; rest; rest &= rest - 1) {
      sum += static_cast<A>(from[std::countr_zero(rest) * dim + d]);
    }
    to[d] = static_cast<T>(sum);
  }
}

// Writes one slot of x and z from a row of the arena or from a pooled bag.
template <int fixed, typename S, typename T>
INLINE void write_slot(const S* __restrict row, T* __restrict x, T* __restrict z, const Sums& sums,
                       int64_t stride, const Sizes& s) {
  const int64_t dim = fixed ? fixed : s.dim;
  for (int64_t g = 0; g < s.spaces; ++g) {
    if constexpr (fixed && std::is_same_v<S, T>) {
      std::memcpy(x + g * stride, row + g * dim, fixed * sizeof(T));
    } else {
      for (int64_t d = 0; d < dim; ++d) x[g * stride + d] = static_cast<T>(row[g * dim + d]);
    }
  }
  for (size_t k = 0; k < sums.size(); ++k) sum_spaces<fixed>(row, sums[k], z + k * stride, dim);
}

// The rows of a bag that are not padding; their number.
template <typename Id>
int64_t count_real(const Id* rows, int64_t begin, int64_t end) {
  return std::count_if(rows + begin, rows + end, [](Id row) { return row != 0; });
}

// Samples begin..end. Returns the place of an id outside the arena (n-th id, or after all ids the
// n-th row of a bag), or -1.
template <int fixed, typename T, typename Id, typename A = Sum<T>>
INLINE int64_t gather(const T* weight, const Id* ids, const int64_t* offsets, const Bags<Id>& bags,
                      T* x, T* z, const Sums& sums, const Sizes& s, int64_t begin, int64_t end) {
  const int64_t width = s.spaces * (fixed ? fixed : s.dim), stride = s.batch * s.columns() * s.dim;
  const int64_t last = end * s.fields;
  std::vector<A> pooled(s.bags ? width : 0);
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t f = 0; f < s.fields; ++f) {
      const int64_t i = b * s.fields + f, row = offsets[f] + static_cast<int64_t>(ids[i]);
      if (row < 0 || row >= s.rows) return i;
      if (const int64_t j = i + kAhead; j < last) {
        const auto next = static_cast<uint64_t>(offsets[j % s.fields]) + static_cast<uint64_t>(ids[j]);
        if (next < static_cast<uint64_t>(s.rows)) {
          prefetch(weight + next * width, width * sizeof(T));
        }
      }
      const int64_t slot = (b * s.columns() + f) * s.dim;
      write_slot<fixed>(weight + row * width, x + slot, z + slot, sums, stride, s);
    }
    for (int64_t bag = 0; bag < s.bags; ++bag) {
      const int64_t* bounds = bags.bounds + bag * (s.batch + 1) + b;
      std::fill(pooled.begin(), pooled.end(), A(0));
      for (int64_t j = bounds[0]; j < bounds[1]; ++j) {
        const int64_t row = static_cast<int64_t>(bags.rows[j]);
        if (row < 0 || row >= s.rows) return s.batch * s.fields + j;
        if (const int64_t next = j + kAhead; next < bags.n) {
          const auto ahead = static_cast<uint64_t>(bags.rows[next]);
          if (ahead < static_cast<uint64_t>(s.rows)) {
            prefetch(weight + ahead * width, width * sizeof(T));
          }
        }
        if (row == 0) continue;
        const A scale = bags.weights ? static_cast<A>(bags.weights[j]) : A(1);
        const T* from = weight + row * width;
        for (int64_t d = 0; d < width; ++d) pooled[d] += scale * static_cast<A>(from[d]);
      }
      if (bags.mean >> bag & 1) {
        const int64_t real = count_real(bags.rows, bounds[0], bounds[1]);
        for (A& value : pooled) value /= static_cast<A>(std::max<int64_t>(real, 1));
      }
      const int64_t slot = (b * s.columns() + s.fields + bag) * s.dim;
      write_slot<fixed>(pooled.data(), x + slot, z + slot, sums, stride, s);
    }
  }
  return -1;
}

// Where the occurrences of each row are, what their gradients are multiplied by, and which sums
// (a bit each) every space is in.
struct Plan {
  const int32_t *segments, *sources;
  const double* scales;  // nullptr: all 1
  std::vector<uint64_t> in;
  const int64_t* rows = nullptr;  // of the table, where the result goes there
};

// Rows begin..end of the plan, written to their places in the table or one after another.
template <int fixed, typename T, typename A = Sum<T>>
INLINE void reduce(const T* grad_x, const T* grad_z, int64_t sums, const Plan& plan, T* out,
                   const Sizes& s, int64_t begin, int64_t end) {
  constexpr int lanes = Lanes<A>::n;
  using V = typename Lanes<A>::type;
  const int64_t dim = fixed ? fixed : s.dim, width = s.spaces * dim;
  const int64_t stride = s.batch * s.columns() * dim;  // columns = the slots of a sample
  const int64_t last = plan.segments[end];
  std::vector<A> total(width);
  for (int64_t u = begin; u < end; ++u) {
    std::fill(total.begin(), total.end(), A(0));
    for (int64_t i = plan.segments[u]; i < plan.segments[u + 1]; ++i) {
      if (i + kAhead < last) {
        const int64_t next = plan.sources[i + kAhead] * dim;
        for (int64_t g = 0; g < s.spaces; ++g) {
          prefetch(grad_x + g * stride + next, dim * sizeof(T));
        }
        for (int64_t k = 0; k < sums; ++k) prefetch(grad_z + k * stride + next, dim * sizeof(T));
      }
      const A scale = plan.scales ? static_cast<A>(plan.scales[i]) : A(1);
      for (int64_t g = 0; g < s.spaces; ++g) {
        const int64_t slot = plan.sources[i] * dim;
        const T* x = grad_x + g * stride + slot;
        A* to = total.data() + g * dim;
        int64_t d = 0;
        for (; d + lanes <= dim; d += lanes) {
          V term, sum;
          load(x + d, term);
          for (uint64_t rest = plan.in[g]; rest; rest &= rest - 1) {
            V value;
            load(grad_z + std::countr_zero(rest) * stride + slot + d, value);
            term += value;
          }
          load(to + d, sum);
          sum += scale * term;
          store(sum, to + d);
        }
        for (; d < dim; ++d) {
          A term = static_cast<A>(x[d]);
          for (uint64_t rest = plan.in[g]; rest; rest &= rest - 1) {
            term += static_cast<A>(grad_z[std::countr_zero(rest) * stride + slot + d]);
          }
          to[d] += scale * term;
        }
      }
    }
    T* to = out + (plan.rows ? plan.rows[u] : u) * width;
    for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(total[d]);
  }
}

// The official code's dimension, with its loops unrolled, and every other.
template <typename F>
INLINE auto for_dim(int64_t dim, const F& run) {
  return dim == 16 ? run(std::integral_constant<int, 16>()) : run(std::integral_constant<int, 0>());
}

// A template cannot be multiversioned, so each type has its entries.
#define GATHER(T, Id)                                                                             \
  MULTIVERSION int64_t gather_entry(const T* weight, const Id* ids, const int64_t* offsets,       \
                                    const Bags<Id>& bags, T* x, T* z, const Sums& sums,           \
                                    const Sizes& s, int64_t begin, int64_t end) {                 \
    return for_dim(s.dim, [&](auto fixed) INLINE_LAMBDA {                                         \
      return gather<fixed()>(weight, ids, offsets, bags, x, z, sums, s, begin, end);              \
    });                                                                                           \
  }
#define REDUCE(T)                                                                                 \
  MULTIVERSION void reduce_entry(const T* grad_x, const T* grad_z, int64_t sums,                  \
                                 const Plan& plan, T* out, const Sizes& s, int64_t begin,         \
                                 int64_t end) {                                                   \
    for_dim(s.dim, [&](auto fixed) INLINE_LAMBDA {                                                \
      reduce<fixed()>(grad_x, grad_z, sums, plan, out, s, begin, end);                            \
    });                                                                                           \
  }
#define ENTRIES(T) GATHER(T, int32_t) GATHER(T, int64_t) REDUCE(T)
ENTRIES(double)
ENTRIES(float)
ENTRIES(BFloat16)
ENTRIES(Half)

// Calls run(pointer to the ids) for the types of ids.
template <typename F>
void for_ids(const Tensor& ids, const F& run) {
  if (ids.scalar_type() == ScalarType::Int) {
    run(static_cast<const int32_t*>(ids.const_data_ptr()));
  } else {
    STEM_FAST_CHECK(ids.scalar_type() == ScalarType::Long, "lookup: ids must be int32 or int64");
    run(static_cast<const int64_t*>(ids.const_data_ptr()));
  }
}

// The ids, offsets and bags of a batch, checked and contiguous.
struct Batch {
  Tensor ids, offsets;
  std::vector<Tensor> bags;
  uint64_t mean;
  int64_t batch, fields, sequences;

  Batch(const Tensor& ids_in, const Tensor& offsets_in, const std::vector<Tensor>& bags_in,
        int64_t mean_in)
      : ids(torch::stable::contiguous(ids_in)),
        offsets(torch::stable::contiguous(offsets_in)),
        mean(static_cast<uint64_t>(mean_in)) {
    STEM_FAST_CHECK(ids.dim() == 2 && offsets.dim() == 1 && offsets.size(0) == ids.size(1),
                    "lookup: ids must be [B, F] and offsets [F]");
    STEM_FAST_CHECK(offsets.scalar_type() == ScalarType::Long, "lookup: offsets must be int64");
    batch = ids.size(0), fields = ids.size(1), sequences = 0;
    if (bags_in.empty()) return;
    STEM_FAST_CHECK(bags_in.size() <= 3 && bags_in.size() >= 2 && bags_in[0].dim() == 1 &&
                        bags_in[1].dim() == 2 && bags_in[1].size(1) == batch + 1 &&
                        bags_in[1].scalar_type() == ScalarType::Long,
                    "lookup: bags must be rows [n], int64 bounds [S, B+1] and perhaps weights [n]");
    STEM_FAST_CHECK(bags_in[0].scalar_type() == ids.scalar_type(),
                    "lookup: the rows of bags must have the type of ids");
    for (const Tensor& part : bags_in) bags.push_back(torch::stable::contiguous(part));
    sequences = bags[1].size(0);
    STEM_FAST_CHECK(sequences <= 64, "lookup: at most 64 sequence fields");
    const int64_t n = bags[0].size(0);
    if (bags.size() == 3) {
      STEM_FAST_CHECK(bags[2].dim() == 1 && bags[2].size(0) == n,
                      "lookup: the weights of bags must be [n], n = ", n);
      bags[2] = torch::stable::to(bags[2], ScalarType::Double);
    }
    const auto* bounds = static_cast<const int64_t*>(bags[1].const_data_ptr());
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t b = 0; b <= batch; ++b) {
        const int64_t at = s * (batch + 1) + b;
        const int64_t low = at ? bounds[at - 1] : 0, bound = bounds[at];
        STEM_FAST_CHECK(low <= bound && bound <= n, "lookup: bound ", bound, " of bag field ", s,
                        " at row ", b, " must be in ", low, "..", n);
      }
    }
  }

  template <typename Id>
  Bags<Id> typed() const {
    if (bags.empty()) return {};
    return {static_cast<const Id*>(bags[0].const_data_ptr()),
            static_cast<const int64_t*>(bags[1].const_data_ptr()),
            bags.size() == 3 ? static_cast<const double*>(bags[2].const_data_ptr()) : nullptr, mean,
            bags[0].size(0)};
  }
};

Sums masks(const std::vector<int64_t>& sums, int64_t spaces) {
  STEM_FAST_CHECK(spaces <= 64 && sums.size() <= 64, "lookup: at most 64 spaces and 64 sums");
  for (const int64_t mask : sums) {
    STEM_FAST_CHECK(mask > 0 && (spaces > 62 || mask >> spaces == 0),
                    "lookup: a sum must name some of the ", spaces, " spaces; it is ", mask);
  }
  return {sums.begin(), sums.end()};
}

std::tuple<Tensor, Tensor> lookup(const Tensor& weight_in, const Tensor& ids_in,
                                  const Tensor& offsets_in, int64_t spaces,
                                  const std::vector<int64_t>& sums_in,
                                  const std::vector<Tensor>& bags_in, int64_t mean) {
  STEM_FAST_CHECK(weight_in.dim() == 2 && spaces > 0 && weight_in.size(1) % spaces == 0,
                  "lookup: weight must be [R, G*D] with G = ", spaces);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Batch in(ids_in, offsets_in, bags_in, mean);
  const Sums sums = masks(sums_in, spaces);
  const Sizes s{weight.size(0), in.batch, in.fields, in.sequences, spaces, weight.size(1) / spaces};
  const auto count = static_cast<int64_t>(sums.size());
  Tensor x = empty_kept(weight, {spaces, s.batch, s.columns() * s.dim}, kHugePage);
  Tensor z = empty_kept(weight, {count, s.batch, s.columns() * s.dim}, kHugePage);
  // An exception inside parallel_for would lose its message.
  std::atomic<int64_t> bad{-1};
  for_type(weight.scalar_type(), "lookup", [&](auto zero) {
    using T = decltype(zero);
    for_ids(in.ids, [&]<typename Id>(const Id* ids) {
      const Bags<Id> bags = in.typed<Id>();
      torch::stable::parallel_for(
          0, s.batch, kGrain / (s.columns() + 1) + 1, [&](int64_t begin, int64_t end) {
            const int64_t at = gather_entry(
                static_cast<const T*>(weight.const_data_ptr()), ids,
                static_cast<const int64_t*>(in.offsets.const_data_ptr()), bags,
                static_cast<T*>(x.mutable_data_ptr()), static_cast<T*>(z.mutable_data_ptr()), sums,
                s, begin, end);
            if (at >= 0) bad = at;
          });
      if (const int64_t at = bad; at >= 0) {
        const int64_t ids_read = s.batch * s.fields;
        STEM_FAST_CHECK(at >= ids_read, "lookup: id ", ids[at], " of field ", at % s.fields,
                        " at row ", at / s.fields, " is outside the arena of ", s.rows, " rows");
        STEM_FAST_CHECK(false, "lookup: row ", bags.rows[at - ids_read], " at ", at - ids_read,
                        " of the bags is outside the arena of ", s.rows, " rows");
      }
    });
  });
  return {x, z};
}

// The place in ids [B, F] of the first that is not one of its field's rows, or -1, as int64 [].
Tensor outside(const Tensor& ids_in, const Tensor& sizes_in) {
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor sizes = torch::stable::contiguous(sizes_in);
  STEM_FAST_CHECK(ids.dim() == 2 && sizes.dim() == 1 && sizes.size(0) == ids.size(1) &&
                      sizes.scalar_type() == ScalarType::Long,
                  "outside: ids must be [B, F] and sizes int64 [F]");
  const Tensor found = torch::stable::new_empty(ids, {}, ScalarType::Long);
  auto* at = static_cast<int64_t*>(found.mutable_data_ptr());
  const auto* size = static_cast<const int64_t*>(sizes.const_data_ptr());
  const int64_t fields = ids.size(1), all = ids.numel();
  for_ids(ids, [&](const auto* id) {
    const auto wrong = [&](int64_t i, int64_t f) {
      return static_cast<uint64_t>(int64_t{id[i]}) >= static_cast<uint64_t>(size[f]);
    };
    bool any = false;
    for (int64_t i = 0; i < all; i += fields) {
      for (int64_t f = 0; f < fields; ++f) any |= wrong(i + f, f);
    }
    *at = any ? 0 : -1;
    while (any && !wrong(*at, *at % fields)) ++*at;
  });
  return found;
}

// Sorts by the upper half of each item, keeping the order of equals; `top` is the largest upper
// half. Least significant digit first, in as few passes as digits of 11 bits allow.
void sort(std::vector<uint64_t>& items, uint64_t top) {
  const int bits = std::bit_width(top), passes = (bits + 10) / 11;
  std::vector<uint64_t> other(items.size());
  for (int pass = 0; pass < passes; ++pass) {
    const int digit = (bits + passes - 1) / passes, shift = 32 + pass * digit;
    const uint64_t mask = (uint64_t{1} << digit) - 1;
    std::vector<uint32_t> start((size_t{1} << digit) + 1);
    for (const uint64_t item : items) ++start[(item >> shift & mask) + 1];
    for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
    for (const uint64_t item : items) other[start[item >> shift & mask]++] = item;
    items.swap(other);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_plan(const Tensor& ids_in, const Tensor& offsets_in,
                                                    const std::vector<Tensor>& bags_in,
                                                    int64_t mean) {
  const Batch in(ids_in, offsets_in, bags_in, mean);
  const int64_t columns = in.fields + in.sequences, ids_read = in.batch * in.fields;
  const int64_t n = in.bags.empty() ? 0 : in.bags[0].size(0);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STEM_FAST_CHECK(in.batch * columns <= kMost && ids_read + n <= kMost,
                  "row_plan: at most ", kMost, " ids and places a batch");
  // An item is a row and, below it, the number of its occurrence.
  std::vector<uint64_t> items;
  items.reserve(ids_read + n);
  std::vector<int32_t> slots(n);  // of the occurrences in bags
  std::vector<double> factors(n);
  uint64_t top = 0;
  const auto add = [&](int64_t row, int64_t occurrence) {
    STEM_FAST_CHECK(row >= 0 && row <= std::numeric_limits<uint32_t>::max(), "row_plan: row ", row,
                    " is outside every arena");
    top = std::max<uint64_t>(top, row);
    items.push_back(static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(occurrence));
  };
  for_ids(in.ids, [&]<typename Id>(const Id* ids) {
    const auto* offsets = static_cast<const int64_t*>(in.offsets.const_data_ptr());
    for (int64_t b = 0, i = 0; b < in.batch; ++b) {
      for (int64_t f = 0; f < in.fields; ++f, ++i) {
        if (ids[i] != 0) add(offsets[f] + static_cast<int64_t>(ids[i]), i);
      }
    }
    const Bags<Id> bags = in.typed<Id>();
    for (int64_t s = 0; s < in.sequences; ++s) {
      for (int64_t b = 0; b < in.batch; ++b) {
        const int64_t* bounds = bags.bounds + s * (in.batch + 1) + b;
        const int64_t real = count_real(bags.rows, bounds[0], bounds[1]);
        const double divisor = in.mean >> s & 1 ? static_cast<double>(real) : 1.0;
        for (int64_t j = bounds[0]; j < bounds[1]; ++j) {
          if (bags.rows[j] == 0) continue;
          slots[j] = static_cast<int32_t>(b * columns + in.fields + s);
          factors[j] = (bags.weights ? bags.weights[j] : 1.0) / divisor;
          add(static_cast<int64_t>(bags.rows[j]), ids_read + j);
        }
      }
    }
  });
  sort(items, top);

  const auto m = static_cast<int64_t>(items.size());
  int64_t unique = 0;
  for (int64_t i = 0; i < m; ++i) unique += i == 0 || items[i] >> 32 != items[i - 1] >> 32;
  const auto fresh = [&](int64_t size, ScalarType type) {
    return torch::stable::new_empty(in.ids, {size}, type);
  };
  Tensor rows = fresh(unique, ScalarType::Long), segments = fresh(unique + 1, ScalarType::Int);
  Tensor sources = fresh(m, ScalarType::Int);
  Tensor scales = fresh(in.bags.empty() ? 0 : m, ScalarType::Double);
  auto* row = static_cast<int64_t*>(rows.mutable_data_ptr());
  auto* segment = static_cast<int32_t*>(segments.mutable_data_ptr());
  auto* source = static_cast<int32_t*>(sources.mutable_data_ptr());
  auto* scale = static_cast<double*>(scales.mutable_data_ptr());
  int64_t u = 0;
  for (int64_t i = 0; i < m; ++i) {
    const auto here = static_cast<int64_t>(items[i] >> 32);
    const auto occurrence = static_cast<int64_t>(items[i] & 0xFFFFFFFF);
    if (u == 0 || row[u - 1] != here) {
      row[u] = here;
      segment[u++] = static_cast<int32_t>(i);
    }
    const bool bag = occurrence >= ids_read;
    source[i] = bag ? slots[occurrence - ids_read]
                    : static_cast<int32_t>(occurrence / in.fields * columns + occurrence % in.fields);
    if (!in.bags.empty()) scale[i] = bag ? factors[occurrence - ids_read] : 1.0;
  }
  segment[u] = static_cast<int32_t>(m);
  return {rows, segments, sources, scales};
}

// The gradient of a plan's rows: [U, G*D], or with `table` that many rows, zero but for the plan's.
Tensor reduce_rows(const Tensor& grad_x_in, const Tensor& grad_z_in,
                   const std::vector<int64_t>& sums_in, const Tensor& segments_in,
                   const Tensor& sources_in, const Tensor& scales_in, int64_t dim,
                   const Tensor* rows, int64_t table) {
  const auto count = static_cast<int64_t>(sums_in.size());
  STEM_FAST_CHECK(grad_x_in.dim() == 3 && grad_z_in.dim() == 3 && dim > 0 &&
                      grad_x_in.size(2) % dim == 0 && grad_z_in.size(0) == count &&
                      grad_z_in.size(1) == grad_x_in.size(1) &&
                      grad_z_in.size(2) == grad_x_in.size(2) &&
                      grad_z_in.scalar_type() == grad_x_in.scalar_type(),
                  "row_gradients: gradients must be [G, B, C*D] and [K, B, C*D] of one type");
  const Tensor grad_x = torch::stable::contiguous(grad_x_in);
  const Tensor grad_z = torch::stable::contiguous(grad_z_in);
  const Tensor segments = torch::stable::contiguous(segments_in);
  const Tensor sources = torch::stable::contiguous(sources_in);
  const Tensor scales = torch::stable::contiguous(scales_in);
  const int64_t m = sources.numel(), unique = segments.numel() - 1;
  STEM_FAST_CHECK(segments.scalar_type() == ScalarType::Int &&
                      sources.scalar_type() == ScalarType::Int &&
                      scales.scalar_type() == ScalarType::Double && unique >= 0 &&
                      (scales.numel() == 0 || scales.numel() == m),
                  "row_gradients: segments, sources and scales must be a row plan's");
  const Sizes s{0, grad_x.size(1), grad_x.size(2) / dim, 0, grad_x.size(0), dim};
  const Sums sums = masks(sums_in, s.spaces);
  Plan plan{static_cast<const int32_t*>(segments.const_data_ptr()),
            static_cast<const int32_t*>(sources.const_data_ptr()),
            scales.numel() ? static_cast<const double*>(scales.const_data_ptr()) : nullptr,
            std::vector<uint64_t>(s.spaces)};
  if (rows) plan.rows = static_cast<const int64_t*>(rows->const_data_ptr());
  for (size_t k = 0; k < sums.size(); ++k) {
    for (int64_t g = 0; g < s.spaces; ++g) plan.in[g] |= (sums[k] >> g & 1) << k;
  }
  STEM_FAST_CHECK(plan.segments[0] >= 0 && plan.segments[unique] <= m &&
                      std::is_sorted(plan.segments, plan.segments + unique + 1) &&
                      std::all_of(plan.sources, plan.sources + m,
                                  [&](int32_t at) { return at >= 0 && at < s.batch * s.fields; }),
                  "row_gradients: the plan is of another batch");
  Tensor out = empty_kept(grad_x, {rows ? table : unique, s.spaces * dim}, kScratch);
  const int64_t row_bytes = s.spaces * dim * static_cast<int64_t>(grad_x.element_size());
  if (rows || m == 0) {
    torch::stable::parallel_for(0, out.size(0), kGrain, [&](int64_t begin, int64_t end) {
      std::memset(static_cast<char*>(out.mutable_data_ptr()) + begin * row_bytes, 0,
                  (end - begin) * row_bytes);
    });
  }
  for_type(grad_x.scalar_type(), "row_gradients", [&](auto zero) {
    using T = decltype(zero);
    // Threads share the occurrences evenly; a row belongs to the one in whose part it begins.
    torch::stable::parallel_for(0, m, kGrain, [&](int64_t begin, int64_t end) {
      const auto row_at = [&](int64_t i) -> int64_t {
        if (i == 0) return 0;
        return std::lower_bound(plan.segments, plan.segments + unique, i) - plan.segments;
      };
      reduce_entry(static_cast<const T*>(grad_x.const_data_ptr()),
                   static_cast<const T*>(grad_z.const_data_ptr()), count, plan,
                   static_cast<T*>(out.mutable_data_ptr()), s, row_at(begin),
                   end == m ? unique : row_at(end));
    });
  });
  return out;
}

Tensor row_gradients(const Tensor& grad_x, const Tensor& grad_z, const std::vector<int64_t>& sums,
                     const Tensor& segments, const Tensor& sources, const Tensor& scales,
                     int64_t dim) {
  return reduce_rows(grad_x, grad_z, sums, segments, sources, scales, dim, nullptr, 0);
}

Tensor lookup_backward(const Tensor& grad_x, const Tensor& grad_z, const std::vector<int64_t>& sums,
                       const Tensor& ids, const Tensor& offsets, const std::vector<Tensor>& bags,
                       int64_t mean, int64_t table) {
  const auto [rows, segments, sources, scales] = row_plan(ids, offsets, bags, mean);
  const int64_t columns = ids.size(1) + (bags.empty() ? 0 : bags[1].size(0));
  const int64_t unique = rows.size(0);
  STEM_FAST_CHECK(
      unique == 0 || static_cast<const int64_t*>(rows.const_data_ptr())[unique - 1] < table,
      "lookup_backward: an id is outside the arena of ", table, " rows");
  return reduce_rows(grad_x, grad_z, sums, segments, sources, scales,
                     grad_x.size(2) / std::max<int64_t>(columns, 1), &rows, table);
}

}  // namespace

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("lookup", TORCH_BOX(&lookup));
  m.impl("lookup_backward", TORCH_BOX(&lookup_backward));
  m.impl("outside", TORCH_BOX(&outside));
  m.impl("row_plan", TORCH_BOX(&row_plan));
  m.impl("row_gradients", TORCH_BOX(&row_gradients));
}
