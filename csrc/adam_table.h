// The table of steps that adam_rows reads and adam_schedule writes, and the constants of the method:
// as in stem_fast/reference/adam.py, which a test holds against this file.

#pragma once

#include <cstdint>

// Terms of the series of weights that no gradient has touched, and moments of other rows' steps.
constexpr int kSeries = 8, kPowers = 7;
// Columns of a line. With L2 the series stand in place of the moments.
enum Column {
  kSize = 0,
  kRoot = 1,
  kDecay = 2,
  kLeft = 3,
  kMoments = 4,
  kNew = kMoments,
  kGrowth = kNew + 3 * kSeries,
  kColumns = kGrowth + 1
};
// Up to this growth times the weight, the series are exact to float32's rounding; kUnknown stands in
// its place where they are not known, and it is at least kLeastGrowth, to be divided by.
constexpr double kConverged = 0.5, kLeastGrowth = 1e-30, kUnknown = 0x1p100;
// Momentum of which no more is left moves nothing.
constexpr double kNegligibleMomentum = 0x1p-60;
// Steps with L2 after which a row is looked at again: it may have been pulled to nothing.
constexpr int64_t kLook = 16;
