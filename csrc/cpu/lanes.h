// Vectors of sums, in GCC's vector extension, and functions compiled for several instruction sets.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../check.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// One function for each instruction set, chosen at run time. Older compilers do not know the names,
// and the sanitizers (make sanitize) would only take three times as long to compile.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__)
#define MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// Sums are kept in float32, those of float64 in float64.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 32 bytes of sums: one AVX2 register, two of the baseline's. GCC keeps wider vectors than the
// machine's in memory.
template <typename A>
struct Lanes {
  static constexpr int n = 32 / sizeof(A);
  typedef A type __attribute__((vector_size(32)));
};

// The bits of as many bfloat16, and of the float32 they are the upper half of.
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));

template <typename T, typename V = typename Lanes<Sum<T>>::type>
INLINE void load(const T* from, V& to) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(&to, from, sizeof(V));
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    Halves half;
    std::memcpy(&half, from, sizeof(half));
    const Words word = __builtin_convertvector(half, Words) << 16;
    std::memcpy(&to, &word, sizeof(V));
  } else {
    for (int i = 0; i < Lanes<Sum<T>>::n; ++i) to[i] = static_cast<float>(from[i]);
  }
}

template <typename T, typename V = typename Lanes<Sum<T>>::type>
INLINE void store(const V& from, T* to) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(to, &from, sizeof(V));
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    // To the nearest, ties to even; NaN has a bit of its own, lest rounding make it infinite.
    Words word;
    std::memcpy(&word, &from, sizeof(V));
    const Words rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    const Words nan = word >> 16 | 0x40;
    const Halves half = __builtin_convertvector(from == from ? rounded : nan, Halves);
    std::memcpy(to, &half, sizeof(half));
  } else {
    for (int i = 0; i < Lanes<Sum<T>>::n; ++i) to[i] = static_cast<T>(from[i]);
  }
}

template <typename V>
INLINE V root(V values) {
  for (size_t i = 0; i < sizeof(V) / sizeof(values[0]); ++i) values[i] = std::sqrt(values[i]);
  return values;
}

// Whether any lane of a comparison is true.
template <typename M>
INLINE bool any(const M& mask) {
  int64_t words[sizeof(M) / sizeof(int64_t)], found = 0;
  std::memcpy(words, &mask, sizeof(M));
  for (const int64_t word : words) found |= word;
  return found != 0;
}

// Like store, but past the caches where the place allows it: no line is read to be overwritten.
template <typename T, typename V = typename Lanes<Sum<T>>::type>
INLINE void stream(const V& from, T* to) {
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    constexpr int parts = Lanes<Sum<T>>::n * sizeof(T) / sizeof(__m128i);
    __m128i part[parts];
    store(from, reinterpret_cast<T*>(part));
    for (int i = 0; i < parts; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part[i]);
    return;
  }
#endif
  store(from, to);
}

// Makes what was streamed visible to other threads before whatever this one writes next.
INLINE void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Rows asked from memory ahead of their use; more than 16 gained nothing.
constexpr int64_t kAhead = 16;

// Asks for bytes from memory, to the second cache: more of them are under way there than the first
// one waits for (on Zen 4 a batch's rows come in 0.6 of the time).
INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
  }
}

// Calls run(a value of the type) for the types that the ops take.
template <typename F>
void for_type(torch::headeronly::ScalarType type, const char* op, const F& run) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double: return run(double());
    case ScalarType::Float: return run(float());
    case ScalarType::BFloat16: return run(torch::headeronly::BFloat16());
    case ScalarType::Half: return run(torch::headeronly::Half());
    default: STEM_FAST_CHECK(false, op, ": a float64, float32, bfloat16 or float16 tensor is due");
  }
}
