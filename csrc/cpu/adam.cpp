// Adam of a batch's rows on CPU, with the steps that they missed: one read and one write of a row's
// weight and state. See reference.adam_rows for the arguments, docs/exact-adam.md for the table of
// steps and the mathematics.
//
// Rows are independent, so the results are the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "../adam_table.h"
#include "lanes.h"
#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Job {
  Table weight, exp_avg, exp_avg_sq;
  int32_t* last;
  const int64_t* rows;  // nullptr: all
  const Table* grad;    // nullptr: none
  const double* steps;
  int64_t base, now, width;
  double beta1, beta2, log1, log2, eps;  // log1, log2: of beta1 and beta2, to base 2
  bool decoupled, l2;

  const double* step(int64_t t) const { return steps + (t - base) * kColumns; }
};

// The three of a row, in the type of sums.
template <typename A>
struct Row {
  A *__restrict w, *__restrict m, *__restrict v;
  int64_t width;
};

// A number that nothing else is small against.
template <typename A>
constexpr A kLeast = std::is_same_v<A, float> ? 1e-30 : 1e-200;

// Neighbouring values of a row in registers: enough of them that one's latency hides another's.
template <typename A>
struct Part {
  static constexpr int n = 6, values = n * Lanes<A>::n;
  typename Lanes<A>::type w[n], m[n], v[n];

  INLINE void read(const Row<A>& row, int64_t at) {
    std::memcpy(w, row.w + at, sizeof(w));
    std::memcpy(m, row.m + at, sizeof(m));
    std::memcpy(v, row.v + at, sizeof(v));
  }
  INLINE void write(const Row<A>& row, int64_t at) const {
    std::memcpy(row.w + at, w, sizeof(w));
    std::memcpy(row.m + at, m, sizeof(m));
    std::memcpy(row.v + at, v, sizeof(v));
  }
  // Whether L2 has nothing left to pull.
  INLINE bool gone() const {
    constexpr A least = kLeast<A>;
    auto above = w[0] != w[0];
    for (int i = 0; i < n; ++i) {
      above |= ~((w[i] <= least) & (w[i] >= -least) & (m[i] <= least) & (m[i] >= -least));  // NaN too
    }
    return !any(above);
  }
};

// One step with the gradients g (nullptr: zeros).
template <typename A, typename V = typename Lanes<A>::type>
INLINE void make_step(const Job& job, const double* step, const A* g, Part<A>& part) {
  const A new1 = 1 - job.beta1, new2 = 1 - job.beta2, eps = job.eps;
  const A size = step[kSize], scale = step[kRoot];
  const A decay = job.decoupled ? 0 : step[kDecay], kept = job.decoupled ? step[kDecay] : 1;
  for (int i = 0; i < Part<A>::n; ++i) {
    V grad = decay * part.w[i];
    if (g) {
      V own;
      std::memcpy(&own, g + i * Lanes<A>::n, sizeof(V));
      grad += own;
    }
    part.m[i] += (grad - part.m[i]) * new1;
    // Not as beta2 * v, whose rounding is the same at every step and adds up.
    part.v[i] += (grad * grad - part.v[i]) * new2;
    part.w[i] = part.w[i] * kept - size * part.m[i] / (root(part.v[i]) * scale + eps);
  }
}

// The series of weights that no gradient has touched, at the end of the steps base + 1 .. `to`.
template <typename A>
struct NewRows {
  A growth;
  A terms[3][kSeries], left;  // of w, m and v, in units of the growth; what is left of v's that was

  NewRows(const Job& job, int64_t to) {
    const double* line = job.step(to);
    growth = line[kGrowth];
    for (int i = 0; i < 3 * kSeries; ++i) terms[i / kSeries][i % kSeries] = line[kNew + i];
    left = std::exp2(job.log2 * static_cast<double>(to - job.base));
  }

  // Makes these steps of a part that has made none, if its m and v are zero (v need not be where the
  // weight is: such a weight stays) and its weights small enough: whether it did.
  template <typename V = typename Lanes<A>::type>
  INLINE bool run(Part<A>& part) const {
    if (growth >= A(kUnknown)) return false;
    auto known = part.w[0] == part.w[0];
    for (int i = 0; i < Part<A>::n; ++i) {
      const V w = part.w[i], size = w < 0 ? -w : w;
      known &= (part.m[i] == 0) & ((part.v[i] == 0) | (w == 0)) & (size * growth <= A(kConverged));
    }
    if (any(~known)) return false;
    for (int i = 0; i < Part<A>::n; ++i) {
      const V w = part.w[i], size = (w < 0 ? -w : w) * growth;
      part.w[i] = w * value(0, size);
      part.m[i] = w * value(1, size);
      part.v[i] = part.v[i] * left + w * w * value(2, size);
    }
    return true;
  }

 private:
  template <typename V>
  INLINE V value(int series, V size) const {
    V sum = terms[series][kSeries - 1] + V{};
    for (int p = kSeries - 2; p >= 0; --p) sum = terms[series][p] + size * sum;
    return sum;
  }
};

// Steps `from` + 1 .. `to` with gradients decay * w.
template <typename A, typename V = typename Lanes<A>::type>
INLINE void replay(const Job& job, const NewRows<A>& fresh, int64_t from, int64_t to,
                   Part<A>& part) {
  // float64 wants more digits than the series have.
  if constexpr (std::is_same_v<A, float>) {
    if (from == job.base && fresh.run(part)) return;
  }
  for (int64_t t = from; t < to;) {
    if (((t - job.base) % kLook == 0 || t == from) && part.gone()) {
      const A left = std::exp2(job.log2 * static_cast<double>(to - t));
      for (int i = 0; i < Part<A>::n; ++i) {
        part.w[i] = part.m[i] = V{};
        part.v[i] *= left;
      }
      return;
    }
    make_step<A>(job, job.step(++t), nullptr, part);
  }
}

// What steps `from` + 1 .. `to` without any gradient make of every row: m and v decay, and w moves by
// m times a sum that depends on v and the steps alone. Of the sums over steps that the table has, the
// central moments: f(x) = 1 / (sqrt(v) * x + eps) is summed over the steps' x by its series around
// their mean.
template <typename A>
struct Missed {
  A left1 = -1, left2, kept;  // of m, v and w; what is not made yet has a power of beta1 below 0
  bool series;                // whether the terms left out are below the rounding of A
  A weight, mean, c2, c3, c4, c5, c6;

  Missed() = default;
  Missed(const Job& job, int64_t from, int64_t to) {
    const double* start = job.step(from);
    const double missed = static_cast<double>(to - from);
    left1 = std::exp2(job.log1 * missed), left2 = std::exp2(job.log2 * missed);
    kept = job.step(to)[kLeft] / start[kLeft];
    const double* raw = start + kMoments;
    double n[kPowers] = {};
    for (int p = 1; raw[0] != 0 && p < kPowers; ++p) n[p] = raw[p] / raw[0];
    const double d = n[1], d2 = d * d, d3 = d2 * d;
    const double middle = std::sqrt(job.beta2) * job.step(from + 1)[kRoot] + d;
    const double sixth =
        n[6] - 6 * d * n[5] + 15 * d2 * n[4] - 20 * d3 * n[3] + 15 * d2 * d2 * n[2] - 5 * d3 * d3;
    constexpr double most = std::is_same_v<A, float> ? 1e-7 : 1e-11;
    const double cube = middle * middle * middle;
    // A step that is made too has its term in the sums already.
    series = !job.grad && raw[0] != 0 && std::abs(sixth) <= most * cube * cube;
    weight = raw[0], mean = middle, c6 = sixth;
    c2 = n[2] - d2;
    c3 = n[3] - 3 * d * n[2] + 2 * d3;
    c4 = n[4] - 4 * d * n[3] + 6 * d2 * n[2] - 3 * d2 * d2;
    c5 = n[5] - 5 * d * n[4] + 10 * d2 * n[3] - 10 * d3 * n[2] + 4 * d2 * d3;
  }
};

// Of the rows of a batch many have missed as many steps.
template <typename A>
class Ages {
 public:
  Ages(const Job& job, int64_t to)
      : job_(job),
        to_(to),
        known_(job.l2 ? 0 : std::clamp<int64_t>(to - job.base, 0, kKnown)) {}

  INLINE const Missed<A>& since(int64_t from) {
    const int64_t age = to_ - from;
    if (age <= static_cast<int64_t>(known_.size())) {
      Missed<A>& found = known_[age - 1];
      if (found.left1 < 0) found = Missed<A>(job_, from, to_);
      return found;
    }
    // Rows that were never trained, or not since a flush, are of one age.
    if (from != other_from_) other_ = Missed<A>(job_, from, to_), other_from_ = from;
    return other_;
  }

 private:
  static constexpr int64_t kKnown = 1024;
  const Job& job_;
  int64_t to_, other_from_ = -1;
  std::vector<Missed<A>> known_;
  Missed<A> other_;
};

// Steps `from` + 1 .. `to` without any gradient, of a part of a row.
template <typename A, typename V = typename Lanes<A>::type>
INLINE void coast(const Job& job, int64_t from, int64_t to, const Missed<A>& missed,
                  Part<A>& part) {
  constexpr int n = Part<A>::n;
  const A eps = job.eps, least = kLeast<A>;
  auto still = part.m[0] == part.m[0];
  for (int i = 0; i < n; ++i) still &= (part.m[i] <= least) & (part.m[i] >= -least);
  V total[n] = {};
  if (any(~still)) {  // else never trained, or long ago
    if (missed.series) {
      for (int i = 0; i < n; ++i) {
        const V s = root(part.v[i]), f = 1 / (s * missed.mean + eps), h = s * f;
        const V bend = missed.c4 - h * (missed.c5 - h * missed.c6);
        total[i] = missed.weight * f * (1 + h * h * (missed.c2 - h * (missed.c3 - h * bend)));
      }
    } else {
      V s[n];
      for (int i = 0; i < n; ++i) s[i] = root(part.v[i]);
      const double* start = job.step(from);
      const double root2 = std::sqrt(job.beta2);
      double momentum = job.beta1, second = root2;
      for (int64_t t = from + 1; t <= to && momentum > kNegligibleMomentum; ++t) {
        const double* step = job.step(t);
        const A weight = step[kSize] * momentum * start[kLeft] / step[kLeft];
        const A x = second * step[kRoot];
        for (int i = 0; i < n; ++i) total[i] += weight / (s[i] * x + eps);
        momentum *= job.beta1;
        second *= root2;
      }
    }
  }
  for (int i = 0; i < n; ++i) {
    part.w[i] = missed.kept * (part.w[i] - part.m[i] * total[i]);
    part.m[i] *= missed.left1;
    part.v[i] *= missed.left2;
  }
}

template <typename A>
INLINE void run(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t values = Part<A>::values;
  const int64_t room = (job.width + values - 1) / values * values;  // what is past the width is zero
  std::vector<A> space(4 * room);
  A* first = space.data();
  Row<A> row{first, first + room, first + 2 * room, job.width};
  // Rows of whole parts in the type of sums need no copy.
  const bool direct = room == job.width && job.weight.template is<A>() &&
                      job.exp_avg.template is<A>() && job.exp_avg_sq.template is<A>();
  A* grad = first + 3 * room;
  const int64_t due = job.grad ? job.now - 1 : job.now;
  Ages<A> ages(job, due);
  const NewRows<A> fresh(job, job.l2 ? due : job.base);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t at = job.rows ? job.rows[u] : u;
    if (job.rows && at == 0) continue;
    if (u + 2 * kAhead < end) {
      __builtin_prefetch(job.last + (job.rows ? job.rows[u + 2 * kAhead] : u + 2 * kAhead), 1);
    }
    if (const int64_t next = u + kAhead; next < end) {
      const int64_t ahead = job.rows ? job.rows[next] : next;
      if (job.grad || job.last[ahead] < due) {
        job.weight.prefetch(ahead);
        job.exp_avg.prefetch(ahead);
        job.exp_avg_sq.prefetch(ahead);
      }
    }
    const int64_t made = std::max<int64_t>(job.last[at], job.base);
    if (made >= job.now) continue;
    if (direct) {
      row.w = job.weight.template row<A>(at);
      row.m = job.exp_avg.template row<A>(at);
      row.v = job.exp_avg_sq.template row<A>(at);
    } else {
      job.weight.read(at, row.w);
      job.exp_avg.read(at, row.m);
      job.exp_avg_sq.read(at, row.v);
    }
    const A* own = grad;
    if (job.grad) {
      if (direct && job.grad->template is<A>()) {
        own = job.grad->template row<A>(u);
      } else {
        job.grad->read(u, grad);
      }
    }
    const Missed<A>* missed = made < due && !job.l2 ? &ages.since(made) : nullptr;
    for (int64_t column = 0; column < job.width; column += values) {
      Part<A> part;
      part.read(row, column);
      if (missed) {
        coast(job, made, due, *missed, part);
      } else if (made < due) {
        replay(job, fresh, made, due, part);
      }
      if (job.grad) make_step<A>(job, job.step(job.now), own + column, part);
      part.write(row, column);
    }
    if (!direct) {
      job.weight.write(at, row.w);
      job.exp_avg.write(at, row.m);
      job.exp_avg_sq.write(at, row.v);
    }
    job.last[at] = static_cast<int32_t>(job.now);
  }
}

// A template cannot be multiversioned, so each type has its entry.
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, float) {
  run<float>(job, begin, end);
}
MULTIVERSION void run_entry(const Job& job, int64_t begin, int64_t end, double) {
  run<double>(job, begin, end);
}

void adam_rows(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& last, const std::optional<Tensor>& rows_in,
               const std::optional<Tensor>& grad_in, const Tensor& steps_in, const Tensor& clock,
               double beta1, double beta2, double eps, bool decoupled, bool l2) {
  const Rows rows("adam_rows", weight, rows_in, grad_in);
  for (const Tensor* state : {&exp_avg, &exp_avg_sq}) {
    check_state("adam_rows", "exp_avg and exp_avg_sq", weight, *state);
  }
  STEM_FAST_CHECK(exp_avg_sq.element_size() >= 4, "adam_rows: exp_avg_sq must be float32 or float64");
  const Steps steps("adam_rows", weight, last, steps_in, kColumns, clock);
  const int64_t width = weight.size(1);
  const Job job{{weight, width},
          {exp_avg, width},
          {exp_avg_sq, width},
          steps.last,
          rows.named(),
          rows.grad(),
          steps.table(),
          steps.base,
          steps.now,
          width,
          beta1,
          beta2,
          std::log2(beta1),
          std::log2(beta2),
          eps,
          decoupled,
          l2};
  for_type(weight.scalar_type(), "adam_rows", [&](auto zero) {
    torch::stable::parallel_for(0, rows.count, kGrain, [&](int64_t begin, int64_t end) {
      const FlushToZero mode;
      run_entry(job, begin, end, Sum<decltype(zero)>());
    });
  });
}

using Terms = std::array<double, kSeries>;

Terms product(const Terms& a, const Terms& b) {
  Terms found{};
  for (int i = 0; i < kSeries; ++i) {
    for (int j = 0; i + j < kSeries; ++j) found[i + j] += a[i] * b[j];
  }
  return found;
}

// The series of weights that no gradient has touched after one more step; see reference.new_rows.
void extend(const double* before, double* own, double beta1, double beta2, double eps) {
  const double decay = own[kDecay], rate = own[kSize] / eps;
  Terms w, m, v, grad, root{}, q{}, inverse{1};
  double powers[kSeries] = {1};  // of the growth
  for (int i = 1; i < kSeries; ++i) powers[i] = powers[i - 1] * before[3 * kSeries];
  for (int i = 0; i < kSeries; ++i) {
    w[i] = before[i] * powers[i], grad[i] = decay * w[i];
    m[i] = beta1 * before[kSeries + i] * powers[i] + (1 - beta1) * grad[i];
  }
  const Terms squares = product(grad, grad);
  for (int i = 0; i < kSeries; ++i) {
    v[i] = beta2 * before[2 * kSeries + i] * powers[i] + (1 - beta2) * squares[i];
  }
  // The root of v. Over eps it comes with a factor |W|: its terms are those of one place later.
  root[0] = std::sqrt(v[0]);
  const double twice = root[0] > 0 ? 2 * root[0] : 1;
  for (int p = 1; p < kSeries - 1; ++p) {
    double rest = v[p];
    for (int i = 1; i < p; ++i) rest -= root[i] * root[p - i];
    root[p] = rest / twice;
  }
  for (int p = 1; p < kSeries; ++p) q[p] = root[p - 1] * own[kRoot] / eps;
  for (int p = 1; p < kSeries; ++p) {  // of 1 + q
    for (int i = 1; i <= p; ++i) inverse[p] -= q[i] * inverse[p - i];
  }
  const Terms moved = product(m, inverse);
  // How far a weight still goes for each unit of m, along a decaying wave or to rest.
  double reach = rate / (1 - beta1);
  if (decay > 0) reach = std::min(reach, std::sqrt(reach / decay));
  for (int i = 0; i < kSeries; ++i) w[i] -= rate * moved[i];
  const double least = std::abs(w[0]) + reach * std::abs(m[0]);
  double growth = kLeastGrowth, factorial = 1;
  bool known = before[3 * kSeries] < kUnknown;
  for (int p = 1; p < kSeries; ++p) {
    factorial *= p;
    const double units[3] = {least, least, v[0]}, terms[3] = {w[p], reach * m[p], v[p]};
    for (int i = 0; i < 3; ++i) {
      if (units[i] == 0) continue;
      const double term = std::pow(std::abs(terms[i] / units[i]) * factorial, 1.0 / p);
      known &= std::isfinite(term);
      growth = std::max(growth, term);
    }
  }
  if (!known) {
    std::fill(own + kNew, own + kGrowth, 0);
    own[kGrowth] = kUnknown;
    return;
  }
  double unit = 1;
  for (int i = 0; i < kSeries; ++i, unit /= growth) {
    own[kNew + i] = w[i] * unit;
    own[kNew + kSeries + i] = m[i] * unit;
    own[kNew + 2 * kSeries + i] = v[i] * unit;
  }
  own[kGrowth] = growth;
}

// A new line of the table of steps; see reference.adam_schedule.
void adam_schedule(const Tensor& steps, const Tensor& clock, const Tensor& options, double beta1,
                   double beta2, double eps, bool decoupled, bool l2) {
  STEM_FAST_CHECK(steps.dim() == 2 && steps.size(1) == kColumns && steps.is_contiguous() &&
                      steps.scalar_type() == ScalarType::Double,
                  "adam_schedule: steps must be contiguous float64 [N, ",
                  static_cast<int64_t>(kColumns), "]");
  STEM_FAST_CHECK(clock.numel() == 2 && clock.is_contiguous() &&
                      clock.scalar_type() == ScalarType::Long,
                  "adam_schedule: clock must be contiguous int64 [2]");
  STEM_FAST_CHECK(options.numel() == 2 && options.is_contiguous() &&
                      options.scalar_type() == ScalarType::Double,
                  "adam_schedule: options must be contiguous float64 [2]");
  auto* now = static_cast<int64_t*>(clock.mutable_data_ptr());
  const int64_t line = now[1] + 1 - now[0];
  STEM_FAST_CHECK(line > 0 && line < steps.size(0), "adam_schedule: line ", line,
                  " of a table of ", steps.size(0));
  const auto* option = static_cast<const double*>(options.const_data_ptr());
  const double t = static_cast<double>(++now[1]), root2 = std::sqrt(beta2);
  auto* own = static_cast<double*>(steps.mutable_data_ptr()) + line * kColumns;
  std::fill(own, own + kColumns, 0);
  own[kSize] = option[0] / (1 - std::pow(beta1, t));
  own[kRoot] = 1 / std::sqrt(1 - std::pow(beta2, t));
  own[kDecay] = decoupled ? 1 - option[0] * option[1] : option[1];
  own[kLeft] = decoupled ? own[kLeft - kColumns] * own[kDecay] : 1;
  if (l2) {
    const double first[3 * kSeries + 1] = {1};  // W itself
    extend(line == 1 ? first : own - kColumns + kNew, own, beta1, beta2, eps);
    return;
  }
  own[kGrowth] = kUnknown;
  // The lines of rows that made their last step not too long ago gain a term.
  double momentum = beta1, second = root2;
  double* start = own - kColumns;
  for (int64_t age = 1; age <= line && momentum > kNegligibleMomentum; ++age, start -= kColumns) {
    const double distance = second * own[kRoot] - root2 * start[kColumns + kRoot];
    double term = own[kSize] * momentum / own[kLeft] * start[kLeft];
    for (int p = 0; p < kPowers; ++p, term *= distance) start[kMoments + p] += term;
    momentum *= beta1;
    second *= root2;
  }
}

}  // namespace

// The schemas are defined in stem_fast/ops/adam.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("adam_rows", TORCH_BOX(&adam_rows));
  m.impl("adam_schedule", TORCH_BOX(&adam_schedule));
}
