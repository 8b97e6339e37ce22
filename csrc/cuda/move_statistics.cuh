// Kernel of `move_statistics`: running statistics of many BNs in one launch.
#pragma once

#include <vector>

#include "parameter.cuh"
#include "signs.cuh"

namespace fused_res::cuda {

/// The running statistics of a BN, and what moves them.
struct MovedUnit {
  void *mean, *var;      // [C], each of its own format
  const float* vectors;  // [5, C]
  double correction;     // P / (P - 1)
  double momentum;
  int channels;
  Number mean_number, var_number;
};

/// What one launch takes: a kernel's arguments have little room.
constexpr int kMovedUnits = 32;

struct MoveStatistics {
  MovedUnit units[kMovedUnits];
  std::int64_t* counts[kMovedUnits];
  int unit_count, count_count;
};

/// running = (1 - momentum) * running + momentum * batch in double; float is rounded to on the way.
__device__ __forceinline__ void move(void* running, Number number, std::int64_t c, double batch, double momentum) {
  const double old = Parameter{running, number}.wide(c), moved = (1. - momentum) * old + momentum * batch;
  const float rounded = static_cast<float>(moved);
  switch (number) {
    case Number::kHalf:
      static_cast<Half*>(running)[c] = narrow<Half>(rounded);
      break;
    case Number::kBFloat16:
      static_cast<BFloat16*>(running)[c] = narrow<BFloat16>(rounded);
      break;
    case Number::kDouble:
      static_cast<double*>(running)[c] = moved;
      break;
    default:
      static_cast<float*>(running)[c] = rounded;
  }
}

/// A block for each unit, and one for all counters.
static __global__ void __launch_bounds__(kThreads) move_statistics_kernel(MoveStatistics a) {
  const int thread = static_cast<int>(threadIdx.x), number = static_cast<int>(blockIdx.x);
  if (number == a.unit_count) {
    if (thread < a.count_count) ++*a.counts[thread];
    return;
  }
  const MovedUnit& unit = a.units[number];
  const std::int64_t C = unit.channels;
  for (std::int64_t c = thread; c < C; c += kThreads) {
    move(unit.mean, unit.mean_number, c, static_cast<double>(unit.vectors[kMean * C + c]), unit.momentum);
    const double var = static_cast<double>(unit.vectors[kVar * C + c]);
    move(unit.var, unit.var_number, c, unit.correction * var, unit.momentum);
  }
}

/// As many launches as it takes: units that share a BN move its statistics one after the other.
inline void move_statistics(const std::vector<MovedUnit>& units, const std::vector<std::int64_t*>& counts,
                            const Queue& queue) {
  MoveStatistics next{};
  const auto flush = [&] {
    launch(move_statistics_kernel, static_cast<unsigned>(next.unit_count + (next.count_count > 0)), queue, next);
    next = {};
  };
  for (const MovedUnit& unit : units) {
    bool fits = next.unit_count < kMovedUnits;
    for (int u = 0; fits && u < next.unit_count; ++u) {
      const MovedUnit& other = next.units[u];
      fits = unit.mean != other.mean && unit.mean != other.var && unit.var != other.mean && unit.var != other.var;
    }
    if (!fits) flush();
    next.units[next.unit_count++] = unit;
  }
  for (std::int64_t* count : counts) {
    bool fits = next.count_count < kMovedUnits;
    for (int i = 0; fits && i < next.count_count; ++i) fits = count != next.counts[i];
    if (!fits) flush();
    next.counts[next.count_count++] = count;
  }
  flush();
}

}  // namespace fused_res::cuda
