// Vectors of sums, in GCC's vector extension, and functions compiled for several instruction sets.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// One function for each instruction set, chosen at run time. Older compilers do not know the names.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
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

// 64 bytes of sums: one AVX-512 register, two AVX2 ones, four of the baseline's.
template <typename A>
struct Lanes {
  static constexpr int n = 64 / sizeof(A);
  typedef A type __attribute__((vector_size(64)));
};

template <typename T, typename V = typename Lanes<Sum<T>>::type>
INLINE void load(const T* from, V& to) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(&to, from, sizeof(V));
  } else {
    for (int i = 0; i < Lanes<Sum<T>>::n; ++i) to[i] = static_cast<float>(from[i]);
  }
}

template <typename T, typename V = typename Lanes<Sum<T>>::type>
INLINE void store(const V& from, T* to) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    std::memcpy(to, &from, sizeof(V));
  } else {
    for (int i = 0; i < Lanes<Sum<T>>::n; ++i) to[i] = static_cast<T>(from[i]);
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
    default: STD_TORCH_CHECK(false, op, ": a float64, float32, bfloat16 or float16 tensor is due");
  }
}
