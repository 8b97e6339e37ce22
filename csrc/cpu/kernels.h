// What the launchers hand to the CPU kernels: plain structs, and one table of functions for each instruction set.
//
// The kernels are compiled once for each instruction set (variant.cpp) and include nothing of torch or of the C++
// library: an inline function compiled there for AVX-512 could otherwise be the copy that the linker keeps for
// everybody.
#pragma once

#include <cstdint>

namespace fused_res::cpu {

// Widest stretch of channels that a reduction's task covers; its accumulators stay in the innermost cache.
constexpr int64_t kStretch = 256;

// Longest row, in bytes, of results that are written past the caches.
constexpr int64_t kStreamedRow = 4096;

// How a reduction cuts [pixels, channels]: a task is a tile of rows times a stretch of channels, and goes through its
// tile in blocks of rows that fit the cache. A function of the shape and the element size alone, whatever the number of
// threads.
struct Tiling {
  int64_t pixels, channels;
  int64_t block;      // rows in a block
  int64_t rows;       // rows in a tile, the last one apart
  int64_t tiles;      // tiles of rows
  int64_t stretches;  // stretches of channels
};

struct BnStats {
  Tiling tiling;
  const void* y;
  void* partials;
};

struct BnAct {
  int64_t channels;
  const void *y, *vectors, *skip, *y2, *vectors2;
  void* out;
  uint8_t* signs;
  bool stream;  // results go past the caches
};

struct BnActBackwardReduce {
  Tiling tiling;
  const void *dout, *y, *vectors;
  const uint8_t* signs;
  const void *y2, *vectors2;
  void* partials;
};

struct BnActBackwardApply {
  int64_t channels;
  const void *dout, *y, *vectors, *coefficients;
  const uint8_t* signs;
  bool training;
  const void *y2, *coefficients2;
  bool training2;
  void *dy, *dy2, *masked;
  bool stream;
};

enum Dtype { kFloat, kHalf, kBFloat16, kDouble, kDtypes };

// Reductions take a range of tasks, the others a range of rows.
struct Kernels {
  const char* name;
  void (*bn_stats[kDtypes])(const BnStats&, int64_t begin, int64_t end);
  void (*bn_act[kDtypes])(const BnAct&, int64_t begin, int64_t end);
  void (*bn_act_backward_reduce[kDtypes])(const BnActBackwardReduce&, int64_t begin, int64_t end);
  void (*bn_act_backward_apply[kDtypes])(const BnActBackwardApply&, int64_t begin, int64_t end);
};

// The kernels for this CPU, or for the instruction set that FUSED_RES_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace fused_res::cpu
