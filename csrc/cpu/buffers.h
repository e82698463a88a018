// Large outputs in memory that is kept for the next step: the first touch of a fresh page costs the
// kernel (of the operating system) more than ours spends on it, a third of a CPU training step.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

// An uninitialised contiguous tensor of the type and on the device (CPU) of `like`.
torch::stable::Tensor empty_kept(const torch::stable::Tensor& like,
                                 const std::vector<int64_t>& sizes);
