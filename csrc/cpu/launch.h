// What the CPU launchers share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "../new_tensor.h"
#include "kernels.h"
#include "operators.h"

namespace fused_res::cpu {

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Double:
      return kDouble;
    default:
      return kFloat;
  }
}

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* output(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
inline void* output(const OptionalTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Bytes of a block of a reduction: a second pass over it finds it in the cache.
constexpr int64_t kBlockBytes = 64 * 1024;
// Tasks of a reduction, about: enough for many cores, few enough that merging them costs little.
constexpr int64_t kTasks = 128;
// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 32 * 1024;
// Results of this size are no longer in the cache when they are next read, so they are written past it.
constexpr int64_t kStreamBytes = 4 * 1024 * 1024;

inline Tiling tiling(int64_t pixels, int64_t channels, int64_t element_size) {
  const int64_t stretches = divide_up(channels, kStretch), width = std::clamp<int64_t>(channels, 1, kStretch);
  const int64_t block = std::max<int64_t>(8, kBlockBytes / (width * element_size));
  const int64_t most = std::max<int64_t>(1, kTasks / std::max<int64_t>(1, stretches));
  const int64_t rows = block * std::max<int64_t>(1, divide_up(divide_up(pixels, block), most));
  return {pixels, channels, block, rows, std::max<int64_t>(1, divide_up(pixels, rows)), stretches};
}

inline Tiling tiling(const Tensor& y) { return tiling(y.size(0), y.size(1), static_cast<int64_t>(y.element_size())); }

// Runs the kernel over the tasks of a reduction.
template <class Arguments>
void run_tasks(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments) {
  const Tiling& t = arguments.tiling;
  const int64_t elements = std::min(t.rows, t.pixels) * std::min(t.channels, kStretch);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, t.tiles * t.stretches, grain,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Runs the kernel over rows.
template <class Arguments>
void run_rows(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments, int64_t pixels) {
  if (pixels == 0 || arguments.channels == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / arguments.channels);
  torch::stable::parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Whether results like y go past the caches: the instructions for it need aligned rows.
inline bool streams(const Tensor& y, std::initializer_list<const void*> outputs) {
  const int64_t row = y.size(1) * static_cast<int64_t>(y.element_size());
  if (row % 64 != 0 || row > kStreamedRow || y.size(0) * row < kStreamBytes) return false;
  return std::all_of(outputs.begin(), outputs.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; });
}

}  // namespace fused_res::cpu
