// Multi-table embedding lookup on CUDA: all spaces, their sums and pooled bags in one pass; its
// gradient for the rows of a batch alone, through the row plan; and the check of ids.
//
//   weight  [R, G*D]       float64, float32, bfloat16 or float16; sums in float32 (float64)
//   ids     [B, F]         int32 or int64
//   offsets [F]            int64, first row of each field
//   bags    (rows [n], bounds [S, B+1], weights [n])   sequences, see stem_fast/reference/lookup.py
//   x       [G, B, (F+S)*D]
//   z       [K, B, (F+S)*D]
//   plan    (segments [U+1], sources [m], scales [m] or [0])
//
// Nothing here waits for the device, so a row that is outside the arena is read as its nearest.
// Additions are made in an order that the sizes and the plan alone decide: results repeat bit for
// bit.

#include <algorithm>
#include <limits>
#include <tuple>

#include "common.cuh"

namespace stem_fast {
namespace {

// Where __launch_bounds__ names the blocks of a processor too, nvcc had chosen so many for sm_80
// that registers spilled.
constexpr int kThreads = 256;
// Rows that a thread has in flight.
constexpr int kAhead = 4;
constexpr int kMaxSpaces = 64;
constexpr int kMaxSums = 64;
// Occurrences of a row that its own threads sum alone; above, their block does together.
constexpr int kShort = 32;
// A row of very many occurrences is summed in pieces first, by as many blocks.
constexpr int kPiece = 256;

struct Sums {
  int count;
  uint64_t masks[kMaxSums];
};

// Ids of either type; a template would double the kernels.
struct Ids {
  const void* data;
  bool wide;

  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

__device__ int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// sum += scale[n] * from[place[n] ...] for the places that are not negative, loaded together.
template <int n, typename T, typename A>
__device__ void add(A (&sum)[n], const T* from, const int64_t (&place)[kAhead],
                    const A (&scale)[kAhead]) {
  T values[kAhead][n];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (place[i] >= 0) load(from + place[i], values[i]);
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (place[i] < 0) continue;
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] += scale[i] * static_cast<A>(values[i][j]);
  }
}

template <typename T>
struct Lookup {
  const T* weight;
  Ids ids;
  const int64_t* offsets;
  Ids bag_rows;
  const int64_t* bounds;
  const void* bag_weights;  // nullptr: all 1
  bool wide_weights;        // float64, not float32
  uint64_t mean;
  int64_t rows, n;  // of the arena, of the bags
  uint32_t batch, fields, bags;
  int spaces, dim;
  T *x, *z;
  Sums sums;
};

// sum = the part of bag s of sample b that starts at `from` in each row, over the spaces of mask.
template <int n, typename T, typename A>
__device__ void pool(const Lookup<T>& a, uint32_t s, uint32_t b, const T* from, uint64_t mask,
                     A (&sum)[n]) {
  const int64_t* bounds = a.bounds + s * (int64_t{a.batch} + 1) + b;
  const int64_t end = clamp(bounds[1], 0, a.n), width = int64_t{a.spaces} * a.dim;
  int64_t real = 0;
  for (int64_t j = clamp(bounds[0], 0, a.n); j < end; j += kAhead) {
    int64_t place[kAhead];
    A scale[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = j + i < end ? clamp(a.bag_rows[j + i], 0, a.rows - 1) : 0;
      place[i] = row == 0 ? -1 : row * width;
      scale[i] = A(1);
      if (row == 0) continue;
      ++real;
      if (a.bag_weights) {
        scale[i] = a.wide_weights
                       ? static_cast<A>(static_cast<const double*>(a.bag_weights)[j + i])
                       : static_cast<A>(static_cast<const float*>(a.bag_weights)[j + i]);
      }
    }
    for (uint64_t rest = mask; rest; rest &= rest - 1) {
      add(sum, from + (__ffsll(rest) - 1) * int64_t{a.dim}, place, scale);
    }
  }
  if (a.mean >> s & 1 && real > 1) {
#pragma unroll
    for (int i = 0; i < n; ++i) sum[i] /= static_cast<A>(real);
  }
}

// A thread makes n values of a slot in one plane of the output, x[g] or z[k]: a sum of one space or
// of several. The planes of a slot are made in one block, which reads the row from memory once.
// Threads are (places in the slot, slots, planes). Without bags a kernel of half the registers, so
// that more rows are on their way at once.
template <typename T, int n, bool has_bags>
__global__ void __launch_bounds__(kThreads, 2) lookup_kernel(const __grid_constant__ Lookup<T> a) {
  using A = Sum<T>;
  const uint32_t columns = a.fields + a.bags, bags = has_bags ? a.bags * a.batch : 0;
  const uint32_t items = bags + a.fields * a.batch;  // bags first: they take longest
  const int64_t stride = int64_t{a.batch} * columns * a.dim;
  for (uint32_t item = blockIdx.x * blockDim.y + threadIdx.y; item < items;
       item += gridDim.x * blockDim.y) {
    const bool bag = has_bags && item < bags;
    uint32_t b, column;
    int64_t row = 0;
    if (bag) {
      b = item % a.batch;
      column = item / a.batch;
    } else {
      b = (item - bags) / a.fields;
      column = (item - bags) % a.fields;
      row = clamp(a.offsets[column] + a.ids[item - bags], 0, a.rows - 1);
    }
    const int64_t slot = int64_t{b} * columns + column + (bag ? a.fields : 0);
    for (int plane = threadIdx.z; plane < a.spaces + a.sums.count; plane += blockDim.z) {
      const bool single = plane < a.spaces;
      const uint64_t mask = single ? uint64_t{1} << plane : a.sums.masks[plane - a.spaces];
      T* out = (single ? a.x + plane * stride : a.z + (plane - a.spaces) * stride) + slot * a.dim;
      for (int d = threadIdx.x * n; d < a.dim; d += blockDim.x * n) {
        A sum[n] = {};
        if (bag) {
          pool(a, column, b, a.weight + d, mask, sum);
        } else {
          const T* from = a.weight + row * a.spaces * a.dim + d;
          for (uint64_t rest = mask; rest; rest &= rest - 1) {
            T values[n];
            load(from + (__ffsll(rest) - 1) * int64_t{a.dim}, values);
#pragma unroll
            for (int i = 0; i < n; ++i) sum[i] += static_cast<A>(values[i]);
          }
        }
        store(sum, out + d);
      }
    }
  }
}

template <typename T>
struct RowGradients {
  const T *grad_x, *grad_z;
  const int32_t *segments, *sources;
  const double* scales;  // nullptr: all 1
  int64_t rows, stride;  // U, elements of a space of the gradient
  int spaces, dim;
  Sum<T>* pieces;  // [m / kPiece, G*D], only where one row fills the piece
  T* out;
  Sums sums;
};

// The n values of a row, at column c of [G*D], that a thread sums; and who adds to them.
template <typename T>
struct Column {
  const T *x, *z;
  uint64_t sums;  // bit k: z[k] was a sum of this space among others

  __device__ Column(const RowGradients<T>& a, int c) {
    const int space = c / a.dim, d = c % a.dim;
    x = a.grad_x + space * a.stride + d;
    z = a.grad_z + d;
    sums = 0;
    for (int k = 0; k < a.sums.count; ++k) sums |= (a.sums.masks[k] >> space & 1) << k;
  }
};

// Adds the occurrences begin, begin + step, ... below end.
template <int n, typename T, typename A>
__device__ void add_occurrences(const RowGradients<T>& a, const Column<T>& column, int64_t begin,
                                int64_t end, int step, A (&sum)[n]) {
  for (int64_t i = begin; i < end; i += kAhead * step) {
    int64_t place[kAhead];
    A scale[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t at = i + j * step;
      place[j] = at < end ? int64_t{a.sources[at]} * a.dim : -1;
      scale[j] = at < end && a.scales ? static_cast<A>(a.scales[at]) : A(1);
    }
    add(sum, column.x, place, scale);
    for (uint64_t rest = column.sums; rest; rest &= rest - 1) {
      add(sum, column.z + (__ffsll(rest) - 1) * a.stride, place, scale);
    }
  }
}

// The sum over threadIdx.y, for threads of threadIdx.y = 0. All threads of the block come here.
template <int n, typename A>
__device__ void reduce_block(A (&sum)[n]) {
  __shared__ A sums[kThreads * n];
  const int place = (threadIdx.y * blockDim.x + threadIdx.x) * n;
  for (int left = blockDim.y; left > 1;) {
    const int half = (left + 1) / 2, y = threadIdx.y;
    __syncthreads();
    if (y >= half && y < left) {
#pragma unroll
      for (int i = 0; i < n; ++i) sums[place + i] = sum[i];
    }
    __syncthreads();
    if (y + half < left) {
#pragma unroll
      for (int i = 0; i < n; ++i) sum[i] += sums[place + half * blockDim.x * n + i];
    }
    left = half;
  }
}

// The row whose segment holds occurrence `at`: the last that starts there or before. The first warp
// looks, at 32 places at once; all threads of the block get the answer.
template <typename T>
__device__ int64_t find_row(const RowGradients<T>& a, int64_t at) {
  __shared__ int64_t found;
  const int lane = threadIdx.y * blockDim.x + threadIdx.x;
  if (lane < 32) {
    int64_t low = 0, count = a.rows;  // it is one of rows low, low + 1, ...
    while (count > 1) {
      const int64_t step = (count + 31) / 32;
      const bool before = lane * step < count && a.segments[low + lane * step] <= at;
      const int64_t passed = (__popc(__ballot_sync(0xffffffff, before)) - 1) * step;
      low += passed;
      count = step < count - passed ? step : count - passed;
    }
    if (lane == 0) found = low;
  }
  __syncthreads();
  return found;
}

// Block j sums occurrences j * kPiece ... of the plan if they all are of one row. Threads are
// (columns, parts of the piece).
template <typename T, int n>
__global__ void __launch_bounds__(kThreads)
    pieces_kernel(const __grid_constant__ RowGradients<T> a) {
  const int64_t begin = int64_t{blockIdx.x} * kPiece, end = begin + kPiece;
  const int64_t row = find_row(a, begin);
  if (a.segments[row + 1] < end) return;
  const int width = a.spaces * a.dim, block = blockDim.x * n;
  for (int base = 0; base < width; base += block) {
    const int c = base + threadIdx.x * n;
    Sum<T> sum[n] = {};
    if (c < width) add_occurrences(a, {a, c}, begin + threadIdx.y, end, blockDim.y, sum);
    reduce_block(sum);
    if (c < width && threadIdx.y == 0) {
      store(sum, a.pieces + int64_t{blockIdx.x} * width + c);
    }
  }
}

// Threads are (columns, rows), and for a long row (columns, parts of it).
template <typename T, int n>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ RowGradients<T> a) {
  using A = Sum<T>;
  __shared__ int long_rows[kThreads], count;
  const int width = a.spaces * a.dim, block = blockDim.x * n;
  if (threadIdx.x == 0 && threadIdx.y == 0) count = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * blockDim.y, row = first + threadIdx.y;
  if (row < a.rows) {
    const int64_t begin = a.segments[row], end = a.segments[row + 1];
    if (end - begin <= kShort) {
      for (int c = threadIdx.x * n; c < width; c += block) {
        A sum[n] = {};
        add_occurrences(a, {a, c}, begin, end, 1, sum);
        store(sum, a.out + row * width + c);
      }
    } else if (threadIdx.x == 0) {
      // Their order in the list is of no consequence.
      long_rows[atomicAdd(&count, 1)] = threadIdx.y;
    }
  }
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    const int64_t row = first + long_rows[i], y = threadIdx.y;
    const int64_t begin = a.segments[row], end = a.segments[row + 1];
    int64_t inner = (begin + kPiece - 1) / kPiece, outer = end / kPiece;  // the pieces in between
    const int64_t head = inner < outer ? inner * kPiece : end;
    const int64_t tail = inner < outer ? outer * kPiece : end;
    for (int base = 0; base < width; base += block) {
      const int c = base + threadIdx.x * n;
      A sum[n] = {};
      if (c < width) {
        const Column<T> column(a, c);
        add_occurrences(a, column, begin + y, head, blockDim.y, sum);
        for (int64_t piece = inner + y; piece < outer; piece += blockDim.y) {
          A part[n];
          load(a.pieces + piece * width + c, part);
#pragma unroll
          for (int j = 0; j < n; ++j) sum[j] += part[j];
        }
        add_occurrences(a, column, tail + y, end, blockDim.y, sum);
      }
      reduce_block(sum);
      if (c < width && threadIdx.y == 0) store(sum, a.out + row * width + c);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    check_kernel(Ids ids, const int64_t* sizes, long long* bad, int64_t bad_stride, void* out,
                 uint32_t total, uint32_t fields) {
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    const uint32_t f = i % fields;
    const int64_t id = ids[i], size = sizes[f];
    const bool outside = id < 0 || id >= size;
    if (outside) {
      const auto value = static_cast<uint32_t>(clamp(id, INT32_MIN, INT32_MAX));
      atomicMin(bad + f * bad_stride, static_cast<long long>(i / fields) << 32 | value);
    }
    const int64_t known = outside ? size - 1 : id;
    if (ids.wide) {
      static_cast<int64_t*>(out)[i] = known;
    } else {
      static_cast<int32_t*>(out)[i] = static_cast<int32_t>(known);
    }
  }
}

Ids typed(const Tensor& ids, const char* op) {
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STEM_FAST_CHECK(wide || ids.scalar_type() == ScalarType::Int, op,
                  ": ids must be int32 or int64");
  return {ids.const_data_ptr(), wide};
}

Sums masks(const std::vector<int64_t>& sums, int64_t spaces) {
  STEM_FAST_CHECK(spaces <= kMaxSpaces && sums.size() <= kMaxSums, "lookup: at most ", kMaxSpaces,
                  " spaces and ", kMaxSums, " sums");
  Sums found{static_cast<int>(sums.size()), {}};
  for (size_t k = 0; k < sums.size(); ++k) {
    found.masks[k] = static_cast<uint64_t>(sums[k]);
    STEM_FAST_CHECK(found.masks[k] && (spaces == 64 || found.masks[k] >> spaces == 0),
                    "lookup: a sum must name some of the ", spaces, " spaces; it is ", sums[k]);
  }
  return found;
}

// A kernel counts slots and ids in 32 bits, as the row plan does.
void check_count(int64_t count, const char* op) {
  STEM_FAST_CHECK(count <= std::numeric_limits<int32_t>::max(), op, ": at most ",
                  std::numeric_limits<int32_t>::max(), " slots a batch; there are ", count);
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor> lookup(const Tensor& weight_in, const Tensor& ids_in,
                                  const Tensor& offsets_in, int64_t spaces,
                                  const std::vector<int64_t>& sums,
                                  const std::vector<Tensor>& bags_in, int64_t mean) {
  STEM_FAST_CHECK(weight_in.dim() == 2 && spaces > 0 && weight_in.size(1) % spaces == 0,
                  "lookup: weight must be [R, G*D] with G = ", spaces);
  STEM_FAST_CHECK(ids_in.dim() == 2 && offsets_in.dim() == 1 &&
                      offsets_in.size(0) == ids_in.size(1),
                  "lookup: ids must be [B, F] and offsets [F]");
  STEM_FAST_CHECK(offsets_in.scalar_type() == ScalarType::Long, "lookup: offsets must be int64");
  check_device("lookup", weight_in, {ids_in, offsets_in});
  check_device("lookup", weight_in, bags_in);
  const DeviceGuard guard(weight_in.get_device_index());
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const int64_t batch = ids.size(0), fields = ids.size(1), dim = weight.size(1) / spaces;
  int64_t sequences = 0;
  std::vector<Tensor> bags;
  for (const Tensor& part : bags_in) bags.push_back(torch::stable::contiguous(part));
  if (!bags.empty()) {
    STEM_FAST_CHECK(bags.size() <= 3 && bags.size() >= 2 && bags[0].dim() == 1 &&
                        bags[1].dim() == 2 && bags[1].size(1) == batch + 1 &&
                        bags[1].scalar_type() == ScalarType::Long,
                    "lookup: bags must be rows [n], int64 bounds [S, B+1] and perhaps weights [n]");
    STEM_FAST_CHECK(bags[0].scalar_type() == ids.scalar_type(),
                    "lookup: the rows of bags must have the type of ids");
    sequences = bags[1].size(0);
    STEM_FAST_CHECK(sequences <= 64, "lookup: at most 64 sequence fields");
  }
  if (bags.size() == 3) {
    STEM_FAST_CHECK(bags[2].dim() == 1 && bags[2].size(0) == bags[0].size(0),
                    "lookup: the weights of bags must be [n], n = ", bags[0].size(0));
    if (bags[2].scalar_type() != ScalarType::Double) {
      bags[2] = torch::stable::to(bags[2], ScalarType::Float);
    }
  }
  const int64_t columns = fields + sequences;
  check_count(batch * columns, "lookup");
  Tensor x = torch::stable::new_empty(weight, {spaces, batch, columns * dim});
  Tensor z = torch::stable::new_empty(
      weight, {static_cast<int64_t>(sums.size()), batch, columns * dim});
  const Sums named = masks(sums, spaces);
  if (x.numel() == 0) return {x, z};
  STEM_FAST_CHECK(weight.size(0) > 0, "lookup: the arena has no rows");

  for_type(weight.scalar_type(), "lookup", [&](auto zero) {
    using T = decltype(zero);
    Lookup<T> a{};
    a.weight = pointer<T>(weight);
    a.ids = typed(ids, "lookup");
    a.offsets = pointer<int64_t>(offsets);
    if (!bags.empty()) {
      a.bag_rows = typed(bags[0], "lookup");
      a.bounds = pointer<int64_t>(bags[1]);
      a.n = bags[0].size(0);
    }
    if (bags.size() == 3) {
      a.bag_weights = bags[2].const_data_ptr();
      a.wide_weights = bags[2].scalar_type() == ScalarType::Double;
    }
    a.mean = static_cast<uint64_t>(mean);
    a.rows = weight.size(0);
    a.batch = static_cast<uint32_t>(batch);
    a.fields = static_cast<uint32_t>(fields);
    a.bags = static_cast<uint32_t>(sequences);
    a.spaces = static_cast<int>(spaces);
    a.dim = static_cast<int>(dim);
    a.x = static_cast<T*>(x.mutable_data_ptr());
    a.z = static_cast<T*>(z.mutable_data_ptr());
    a.sums = named;
    constexpr int wide = 16 / sizeof(T);
    const bool vectors = dim % wide == 0 && aligned({a.weight, a.x, a.z}, 16);
    const int64_t threads_x = std::min<int64_t>(vectors ? dim / wide : dim, 32);
    const int64_t threads_z = std::min<int64_t>(spaces + named.count, 8);
    const int64_t threads_y = kThreads / (threads_x * threads_z);
    const dim3 block(threads_x, threads_y, threads_z);
    const dim3 grid(blocks_for((batch * columns + threads_y - 1) / threads_y, weight));
    const auto kernel = vectors ? sequences ? lookup_kernel<T, wide, true>
                                            : lookup_kernel<T, wide, false>
                        : sequences ? lookup_kernel<T, 1, true>
                                    : lookup_kernel<T, 1, false>;
    launch("lookup", kernel, grid, block, 0, weight, a);
  });
  return {x, z};
}

Tensor row_gradients(const Tensor& grad_x_in, const Tensor& grad_z_in,
                     const std::vector<int64_t>& sums, const Tensor& segments_in,
                     const Tensor& sources_in, const Tensor& scales_in, int64_t dim) {
  STEM_FAST_CHECK(grad_x_in.dim() == 3 && dim > 0 && grad_x_in.size(2) % dim == 0,
                  "row_gradients: grad_x must be [G, B, C*D] with D = ", dim);
  STEM_FAST_CHECK(grad_z_in.dim() == 3 &&
                      grad_z_in.size(0) == static_cast<int64_t>(sums.size()) &&
                      grad_z_in.size(1) == grad_x_in.size(1) &&
                      grad_z_in.size(2) == grad_x_in.size(2) &&
                      grad_z_in.scalar_type() == grad_x_in.scalar_type(),
                  "row_gradients: grad_z must be [K, B, C*D] of grad_x's type, K = ", sums.size());
  STEM_FAST_CHECK(segments_in.dim() == 1 && segments_in.size(0) > 0 && sources_in.dim() == 1 &&
                      scales_in.dim() == 1 && segments_in.scalar_type() == ScalarType::Int &&
                      sources_in.scalar_type() == ScalarType::Int &&
                      scales_in.scalar_type() == ScalarType::Double &&
                      (scales_in.size(0) == 0 || scales_in.size(0) == sources_in.size(0)),
                  "row_gradients: a plan must be int32 segments [U+1] and sources [m], and float64 "
                  "scales [m] or [0]");
  check_device("row_gradients", grad_x_in, {grad_z_in, segments_in, sources_in, scales_in});
  const DeviceGuard guard(grad_x_in.get_device_index());
  const Tensor grad_x = torch::stable::contiguous(grad_x_in);
  const Tensor grad_z = torch::stable::contiguous(grad_z_in);
  const Tensor segments = torch::stable::contiguous(segments_in);
  const Tensor sources = torch::stable::contiguous(sources_in);
  const Tensor scales = torch::stable::contiguous(scales_in);
  const int64_t spaces = grad_x.size(0), width = spaces * dim, rows = segments.size(0) - 1;
  const int64_t pieces = sources.size(0) / kPiece;
  check_count(width, "row_gradients");
  Tensor out = torch::stable::new_empty(grad_x, {rows, width});
  const Sums named = masks(sums, spaces);
  if (out.numel() == 0) return out;

  for_type(grad_x.scalar_type(), "row_gradients", [&](auto zero) {
    using T = decltype(zero);
    const ScalarType sum = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor scratch = torch::stable::new_empty(grad_x, {pieces, width}, sum);
    RowGradients<T> a{};
    a.grad_x = pointer<T>(grad_x);
    a.grad_z = pointer<T>(grad_z);
    a.segments = pointer<int32_t>(segments);
    a.sources = pointer<int32_t>(sources);
    a.scales = scales.size(0) ? pointer<double>(scales) : nullptr;
    a.rows = rows;
    a.stride = grad_x.size(1) * grad_x.size(2);
    a.spaces = static_cast<int>(spaces);
    a.dim = static_cast<int>(dim);
    a.pieces = static_cast<Sum<T>*>(scratch.mutable_data_ptr());
    a.out = static_cast<T*>(out.mutable_data_ptr());
    a.sums = named;
    constexpr int wide = 16 / sizeof(T);
    const bool vectors = dim % wide == 0 && aligned({a.grad_x, a.grad_z, a.out}, 16);
    const int64_t threads_x = std::min<int64_t>(vectors ? width / wide : width, kThreads);
    const int64_t threads_y = kThreads / threads_x;
    const dim3 block(threads_x, threads_y);
    if (pieces) {
      launch("row_gradients", vectors ? pieces_kernel<T, wide> : pieces_kernel<T, 1>, dim3(pieces),
             block, 0, grad_x, a);
    }
    launch("row_gradients", vectors ? rows_kernel<T, wide> : rows_kernel<T, 1>,
           dim3((rows + threads_y - 1) / threads_y), block, 0, grad_x, a);
  });
  return out;
}

Tensor check_ids(const Tensor& ids_in, const Tensor& sizes_in, const Tensor& bad) {
  STEM_FAST_CHECK(ids_in.dim() == 2 && sizes_in.dim() == 1 && bad.dim() == 1 &&
                      sizes_in.size(0) == ids_in.size(1) && bad.size(0) == ids_in.size(1) &&
                      sizes_in.scalar_type() == ScalarType::Long &&
                      bad.scalar_type() == ScalarType::Long,
                  "check_ids: ids must be [B, F], sizes and bad int64 [F]");
  check_device("check_ids", ids_in, {sizes_in, bad});
  const DeviceGuard guard(ids_in.get_device_index());
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor sizes = torch::stable::contiguous(sizes_in);
  const Ids read = typed(ids, "check_ids");
  check_count(ids.numel(), "check_ids");
  Tensor out = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)});
  if (out.numel() == 0) return out;
  launch("check_ids", check_kernel, dim3(blocks_for((ids.numel() + kThreads - 1) / kThreads, ids)),
         dim3(kThreads), 0, ids, read, pointer<int64_t>(sizes),
         static_cast<long long*>(bad.mutable_data_ptr()), bad.stride(0), out.mutable_data_ptr(),
         static_cast<uint32_t>(ids.numel()), static_cast<uint32_t>(ids.size(1)));
  return out;
}

}  // namespace
}  // namespace stem_fast

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CUDA, m) {
  m.impl("lookup", TORCH_BOX(&stem_fast::lookup));
  m.impl("row_gradients", TORCH_BOX(&stem_fast::row_gradients));
  m.impl("check_ids", TORCH_BOX(&stem_fast::check_ids));
}
