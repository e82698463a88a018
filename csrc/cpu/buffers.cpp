#include "buffers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_map>

#include "../check.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes)
#endif

namespace {

constexpr size_t kPage = size_t{1} << 16;
constexpr int kMapped = 1 << 25;    // bytes from which on glibc maps a block by itself: its most
constexpr int kIdleHeap = 1 << 28;  // bytes of freed memory that it keeps at the heap's end
constexpr int64_t kIdle = 256;  // allocations after which an unused block is given back

// Blocks handed out and taken back, smallest fit first. The address sanitizer (make sanitize) is told
// which part of them is nobody's.
class Pool {
 public:
  // Products have no output that could be given to them, and glibc maps large blocks one by one and
  // gives freed memory back, in every step; here it does not, unless the user has set when it does.
  Pool() {
#ifdef __GLIBC__
    if (!std::getenv("MALLOC_MMAP_THRESHOLD_")) mallopt(M_MMAP_THRESHOLD, kMapped);
    if (!std::getenv("MALLOC_TRIM_THRESHOLD_")) mallopt(M_TRIM_THRESHOLD, kIdleHeap);
#endif
  }

  void* take(size_t asked) {
    const size_t unit = asked < kHugePage ? kPage : kHugePage;
    const size_t bytes = (asked + unit - 1) / unit * unit;
    const std::lock_guard lock(mutex_);
    ++now_;
    give_up(kIdle);
    // No block twice as large: it would be missing where it fits.
    if (auto fit = free_.lower_bound(bytes); fit != free_.end() && fit->first < 2 * bytes) {
      fit = std::prev(free_.upper_bound(fit->first));  // of its size the last used: it may be cached
      void* block = fit->second.first;
      used_[block] = fit->first;
      free_.erase(fit);
      ASAN_UNPOISON_MEMORY_REGION(block, asked);
      return block;
    }
    void* block = std::aligned_alloc(unit, bytes);
    if (block == nullptr) {
      give_up(0);
      block = std::aligned_alloc(unit, bytes);
    }
    STEM_FAST_CHECK(block != nullptr, "empty_kept: not enough memory for ", bytes, " bytes");
#ifdef __linux__
    if (unit == kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
#endif
    used_[block] = bytes;
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(block) + asked, bytes - asked);
    return block;
  }

  void give_back(void* block) {
    const std::lock_guard lock(mutex_);
    const auto it = used_.find(block);
    free_.emplace(it->second, std::pair{block, now_});
    ASAN_POISON_MEMORY_REGION(block, it->second);
    used_.erase(it);
  }

 private:
  // Frees what nobody has asked for in more than that many allocations.
  void give_up(int64_t idle) {
    std::erase_if(free_, [&](const auto& block) {
      const bool old = now_ - block.second.second > idle;
      if (old) std::free(block.second.first);
      return old;
    });
  }

  std::mutex mutex_;
  int64_t now_ = 0;
  std::multimap<size_t, std::pair<void*, int64_t>> free_;  // size -> block, when it came back
  std::unordered_map<void*, size_t> used_;
};

Pool& pool() {
  static Pool& instance = *new Pool;  // never destroyed: tensors may outlive static objects
  return instance;
}

torch::stable::Tensor scratch(const torch::stable::Tensor& like, std::vector<int64_t> sizes) {
  return empty_kept(like, sizes, kScratch);
}

// Asks for huge pages where nothing was written yet: random rows of a table miss the small ones' table.
void huge_pages(const torch::stable::Tensor& table) {
#ifdef __linux__
  const auto first = reinterpret_cast<uintptr_t>(table.mutable_data_ptr());
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + table.numel() * table.element_size()) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

torch::stable::Tensor empty_kept(const torch::stable::Tensor& like,
                                 const std::vector<int64_t>& sizes, size_t least) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1, bytes;
  bool empty = false, overflows = false;
  for (size_t i = sizes.size(); i-- > 0;) {
    STEM_FAST_CHECK(sizes[i] >= 0, "empty_kept: size ", i, " is ", sizes[i], ", must not be negative");
    strides[i] = stride;
    empty |= sizes[i] == 0;
    overflows |= __builtin_mul_overflow(stride, std::max<int64_t>(sizes[i], 1), &stride);
  }
  overflows |= __builtin_mul_overflow(stride, static_cast<int64_t>(like.element_size()), &bytes);
  // The pool rounds up.
  STEM_FAST_CHECK(!overflows && bytes <= std::numeric_limits<int64_t>::max() - int64_t{kHugePage},
                  "empty_kept: not enough memory for 2^63 bytes");
  if (empty) bytes = 0;
  if (bytes < static_cast<int64_t>(least)) return torch::stable::new_empty(like, sizes);
  return torch::stable::from_blob(pool().take(bytes), sizes, strides, like.device(),
                                  like.scalar_type(), [](void* block) { pool().give_back(block); });
}

// The schemas are defined in stem_fast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(stem_fast, CPU, m) {
  m.impl("empty_kept", TORCH_BOX(&scratch));
  m.impl("huge_pages", TORCH_BOX(&huge_pages));
}
