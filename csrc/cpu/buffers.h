// Large outputs in memory that is kept for the next step: the first touch of a fresh page costs the
// kernel (of the operating system) more than ours spends on it, a third of a CPU training step.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

// What lives for a moment is kept from this size on.
constexpr size_t kScratch = size_t{1} << 18;
// What is read or written in no order: in pages of this size the processor finds it at once.
constexpr size_t kHugePage = size_t{1} << 21;
// What lives from the forward to the backward pass, only from the size on that malloc never keeps:
// while ours lay idle, torch would ask malloc for as much.
constexpr size_t kOutput = size_t{1} << 25;

// An uninitialised contiguous tensor of the type and on the device (CPU) of `like`, kept if it has
// at least that many bytes.
torch::stable::Tensor empty_kept(const torch::stable::Tensor& like,
                                 const std::vector<int64_t>& sizes, size_t least);
