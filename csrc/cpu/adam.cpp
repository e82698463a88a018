// Adam of a batch's rows on CPU, with the steps that they missed: one read and one write of a row's
// weight and state. See reference.adam_rows for the arguments, stem_fast/optim.py for the table of
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

#include "lanes.h"
#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of the table of steps. With L2 there are series of kSeries terms in place of the moments.
constexpr int kSeries = 4, kPowers = 7;
enum Column {
  kSize, kRoot, kDecay, kLeft, kMoments, kNew = kMoments, kSteep = kNew + 3 * kSeries, kColumns
};
// Steps of a leap. The table of leaps begins with a line of coefficients for each polynomial.
constexpr int64_t kLeap = 16;
enum Polynomial { kU, kR, kBent, kPolynomials };
constexpr int64_t kTerms = 8;
enum LeapColumn {
  kX, kMean, kBend, kFast, kPull = kFast + 4, kL2 = kPull + 4, kLate, kSquare, kRange, kSlope,
  kSlopeX, kUneven, kSecond, kLeapColumns = kSecond + 4
};
// Up to kWake, times the weight, these series are exact; kSteepest is the most that is kept of it,
// kUnknown in its place where they are not known.
constexpr double kWake = 0.04, kSteepest = 1e6, kUnknown = 0x1p100;
// Momentum of which so little is left moves nothing: 2^-60.
constexpr double kSpent = 0x1p-60;

struct Job {
  Table weight, exp_avg, exp_avg_sq;
  int32_t* last;
  const int64_t* rows;  // nullptr: all
  const Table* grad;    // nullptr: none
  const double *steps, *leaps;
  int64_t base, now, width;
  double beta1, beta2, log1, log2, eps;  // log1, log2: of beta1 and beta2, to base 2
  double keep;                           // what a leap leaves of v
  bool decoupled, l2;

  float terms[kPolynomials][kTerms];  // of leaps, which float64 does not make

  const double* step(int64_t t) const { return steps + (t - base) * kColumns; }
  // Of the steps t + 1 .. t + kLeap.
  const double* leap(int64_t t) const {
    return leaps + (kPolynomials + (t - base) / kLeap) * kLeapColumns;
  }
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
  const A beta2 = job.beta2, new1 = 1 - job.beta1, new2 = 1 - job.beta2, eps = job.eps;
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
    part.v[i] = part.v[i] * beta2 + new2 * grad * grad;
    part.w[i] = part.w[i] * kept - size * part.m[i] / (root(part.v[i]) * scale + eps);
  }
}

// The terms `from` and on of a polynomial in z, over z to the power `from`.
template <int from, typename A, typename V>
INLINE V polynomial(const A* terms, V z) {
  V sum = terms[kTerms - 1] + V{};
  for (int p = kTerms - 2; p >= from; --p) sum = terms[p] + z * sum;
  return sum;
}

// kLeap steps with gradients decay * w at once, if what it leaves out is small: whether it was.
// In three loops, short enough that the processor works on all of a loop's turns at a time.
template <typename A, typename V = typename Lanes<A>::type>
INLINE bool leap(const Job& job, const double* line, Part<A>& part) {
  constexpr int n = Part<A>::n;
  const A beta1 = job.beta1, new1 = 1 - job.beta1, keep = job.keep, eps = job.eps;
  const auto& terms = job.terms;
  A c[kLeapColumns];
  for (int i = 0; i < kLeapColumns; ++i) c[i] = line[i];
  const A *fast = c + kFast, *pull = c + kPull, *second = c + kSecond;
  const A gain = A(0.5) * (1 - job.keep) * c[kSquare], l2 = c[kL2];
  V f[n], h[n], rate[n], own[n], slope[n], u[n], du[n], dr[n], db[n];
  auto exact = part.w[0] == part.w[0];
  for (int i = 0; i < n; ++i) {
    const V gained = gain * part.w[i] * part.w[i], middle = part.v[i] + gained;
    const V s = root(middle) * c[kX];
    f[i] = 1 / (s + eps);
    h[i] = s * f[i];
    rate[i] = f[i] * (c[kMean] + h[i] * h[i] * c[kBend]);
    // How the rate bends by what v gains, and altogether.
    own[i] = h[i] * gained / (middle + std::numeric_limits<A>::min()) * A(-1.0 / kLeap);
    slope[i] = own[i] + c[kSlope] - h[i] * c[kSlopeX];
  }
  for (int i = 0; i < n; ++i) {
    const V z = rate[i] * l2;
    du[i] = polynomial<1>(terms[kU], z);
    dr[i] = polynomial<1>(terms[kR], z);
    db[i] = z * polynomial<1>(terms[kBent], z);
    u[i] = terms[kU][0] + z * du[i];
  }
  Part<A> next;
  for (int i = 0; i < n; ++i) {
    const V w = part.w[i], m = part.m[i], v = part.v[i], z = rate[i] * l2, r = rate[i];
    const V bent = own[i] * terms[kBent][0] + slope[i] * db[i];
    const V late = z * slope[i] * (terms[kBent][0] + db[i]);
    const V w_of_m = beta1 * r * (u[i] + bent) +
                     f[i] * (fast[0] - h[i] * (fast[1] - h[i] * (fast[2] - h[i] * fast[3]))) -
                     r * r * second[2];
    const V w_of_w = z * (dr[i] + new1 * (du[i] - u[i]) + beta1 * bent) -
                     f[i] * (pull[0] - h[i] * (pull[1] - h[i] * (pull[2] - h[i] * pull[3]))) +
                     r * r * second[0];
    const V m_of_m = terms[kR][0] + z * dr[i] - beta1 * late - r * second[3];
    const V m_of_w = l2 * new1 * (u[i] - late) + c[kLate] - r * second[1];
    const V to = w + (w * w_of_w - m * w_of_m);
    next.w[i] = to;
    next.m[i] = w * m_of_w + m * m_of_m;
    next.v[i] = keep * v + gain * (w * w + w * to + to * to) * A(2.0 / 3);
    const V from_w = w < 0 ? -w : w, to_w = to < 0 ? -to : to;
    const V most = from_w > to_w ? from_w : to_w, least = most > c[kMean] ? most : c[kMean] + V{};
    const V range = h[i] * c[kRange], all = range - kLeap * own[i] + c[kUneven];
    const V bend = A(200) * z * z, share = h[i] > bend ? h[i] : bend;
    exact &= (range * range <= A(1e-3)) &
             (gain * most * most * share <= A(1e-4) * (v + gain * w * w)) &
             (all * all * z * most <= A(1e-6) * least) & (z <= A(0.2));
  }
  if (any(!exact)) return false;
  part = next;
  return true;
}

template <typename A, typename V>
INLINE V series(const A* c, V size) {
  return c[0] + size * (c[1] + size * (c[2] + size * c[3]));
}

// Steps base + 1 .. `to` with gradients decay * w, where m and v are zero before: whether they were,
// and w is small enough. A weight that is zero stays, whatever v is.
template <typename A, typename V = typename Lanes<A>::type>
INLINE bool wake(const Job& job, int64_t to, Part<A>& part) {
  const double* line = job.step(to);
  if (!(line[kSteep] <= kSteepest)) return false;
  A c[3 * kSeries];
  for (int i = 0; i < 3 * kSeries; ++i) c[i] = line[kNew + i];
  const A steep = line[kSteep];
  auto known = part.w[0] == part.w[0];
  for (int i = 0; i < Part<A>::n; ++i) {
    const V w = part.w[i], size = w < 0 ? -w : w;
    known &= (part.m[i] == 0) & ((part.v[i] == 0) | (w == 0)) & (size * steep <= A(kWake));
  }
  if (any(~known)) return false;
  const A left = std::exp2(job.log2 * static_cast<double>(to - job.base));
  for (int i = 0; i < Part<A>::n; ++i) {
    const V w = part.w[i], size = w < 0 ? -w : w;
    part.w[i] = w * series(c, size);
    part.m[i] = w * series(c + kSeries, size);
    part.v[i] = part.v[i] * left + w * w * series(c + 2 * kSeries, size);
  }
  return true;
}

// Steps `from` + 1 .. `to` with gradients decay * w.
template <typename A, typename V = typename Lanes<A>::type>
INLINE void replay(const Job& job, int64_t from, int64_t to, Part<A>& part) {
  // float64 wants more digits than a series or a leap has.
  if constexpr (std::is_same_v<A, float>) {
    if (from == job.base && wake(job, to, part)) return;
  }
  for (int64_t t = from; t < to;) {
    const bool aligned = (t - job.base) % kLeap == 0;
    if ((aligned || t == from) && part.gone()) {
      const A left = std::exp2(job.log2 * static_cast<double>(to - t));
      for (int i = 0; i < Part<A>::n; ++i) {
        part.w[i] = part.m[i] = V{};
        part.v[i] *= left;
      }
      return;
    }
    if constexpr (std::is_same_v<A, float>) {
      if (aligned && t + kLeap <= to && leap(job, job.leap(t), part)) {
        t += kLeap;
        continue;
      }
    }
    make_step<A>(job, job.step(++t), nullptr, part);
  }
}

// What steps `from` + 1 .. `to` without any gradient make of every row: m and v decay, and w moves by
// m times a sum that depends on v and the steps alone. Of the sums over steps that Schedule has, the
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
      for (int64_t t = from + 1; t <= to && momentum > kSpent; ++t) {
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
      std::fill(row.v + row.width, row.v + room, A(1));  // else they would refuse a leap
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
        replay(job, made, due, part);
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
               const std::optional<Tensor>& grad_in, const Tensor& steps_in,
               const Tensor& leaps_in, const Tensor& clock, double beta1, double beta2, double eps,
               bool decoupled, bool l2) {
  const Rows rows("adam_rows", weight, rows_in, grad_in);
  for (const Tensor* state : {&exp_avg, &exp_avg_sq}) {
    check_state("adam_rows", "exp_avg and exp_avg_sq", weight, *state);
  }
  STEM_FAST_CHECK(exp_avg_sq.element_size() >= 4, "adam_rows: exp_avg_sq must be float32 or float64");
  const Steps steps("adam_rows", weight, last, steps_in, kColumns, clock);
  STEM_FAST_CHECK(leaps_in.dim() == 2 && leaps_in.size(1) == kLeapColumns &&
                      leaps_in.size(0) >= kPolynomials + steps_in.size(0) / kLeap &&
                      leaps_in.scalar_type() == ScalarType::Double,
                  "adam_rows: leaps must be float64 [", static_cast<int64_t>(kPolynomials),
                  " + N / ", kLeap, ", ", static_cast<int64_t>(kLeapColumns), "]");
  const Tensor leaps = torch::stable::contiguous(leaps_in);
  const int64_t width = weight.size(1);
  Job job{{weight, width},
          {exp_avg, width},
          {exp_avg_sq, width},
          steps.last,
          rows.named(),
          rows.grad(),
          steps.table(),
          static_cast<const double*>(leaps.const_data_ptr()),
          steps.base,
          steps.now,
          width,
          beta1,
          beta2,
          std::log2(beta1),
          std::log2(beta2),
          eps,
          std::pow(beta2, kLeap),
          decoupled,
          l2,
          {}};
  for (int i = 0; i < kPolynomials; ++i) {
    for (int p = 0; p < kTerms; ++p) {
      job.terms[i][p] = static_cast<float>(job.leaps[i * kLeapColumns + p]);
    }
  }
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

// The series of a weight that was never trained after one more step; see reference.new_rows.
void extend(const double* before, double* own, double lr, double beta1, double beta2, double eps) {
  const double decay = own[kDecay];
  Terms w, m, v, grad, q{};
  for (int i = 0; i < kSeries; ++i) {
    w[i] = before[i], grad[i] = decay * w[i];
    m[i] = beta1 * before[kSeries + i] + (1 - beta1) * grad[i];
  }
  const Terms squares = product(grad, grad);
  for (int i = 0; i < kSeries; ++i) v[i] = beta2 * before[2 * kSeries + i] + (1 - beta2) * squares[i];
  // Of sqrt(v) over eps, one term later: it comes with a factor |w|.
  const double s0 = std::sqrt(v[0]), twice = s0 > 0 ? 2 * s0 : 1, s1 = v[1] / twice;
  q = {0, s0, s1, (v[2] - s1 * s1) / twice};
  for (double& term : q) term *= own[kRoot] / eps;
  const Terms q2 = product(q, q), q3 = product(q2, q);
  Terms inverse{1};
  for (int i = 1; i < kSeries; ++i) inverse[i] = q2[i] - q[i] - q3[i];
  const Terms moved = product(m, inverse);
  for (int i = 0; i < kSeries; ++i) {
    own[kNew + i] = w[i] - own[kSize] / eps * moved[i];
    own[kNew + kSeries + i] = m[i];
    own[kNew + 2 * kSeries + i] = v[i];
  }
  const double steep = q[1] * std::sqrt(1 + 4 * lr * decay / eps);
  own[kSteep] = std::max(before[3 * kSeries], steep);
  if (own[kSteep] <= kSteepest && steep <= kSteepest) return;  // NaN is not
  std::fill(own + kNew, own + kSteep, 0);
  own[kSteep] = kUnknown;
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
    const double first[3 * kSeries + 1] = {1};
    extend(line == 1 ? first : own - kColumns + kNew, own, option[0], beta1, beta2, eps);
    return;
  }
  own[kSteep] = kUnknown;
  // The lines of rows that made their last step not too long ago gain a term.
  double momentum = beta1, second = root2;
  double* start = own - kColumns;
  for (int64_t age = 1; age <= line && momentum > kSpent; ++age, start -= kColumns) {
    const double distance = second * own[kRoot] - root2 * start[kColumns + kRoot];
    double term = own[kSize] * momentum / own[kLeft] * start[kLeft];
    for (int p = 0; p < kPowers; ++p, term *= distance) start[kMoments + p] += term;
    momentum *= beta1;
    second *= root2;
  }
}

}  // namespace

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("adam_rows", TORCH_BOX(&adam_rows));
  m.impl("adam_schedule", TORCH_BOX(&adam_schedule));
}
