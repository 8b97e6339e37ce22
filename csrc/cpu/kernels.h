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

// The widest panel of a packed matrix; those of every instruction set divide it.
constexpr int64_t kPanel = 64;

// A matrix [depth, columns], or its transpose as it is stored, becomes panels for products.
struct Pack {
  int64_t depth, columns;
  const void* from;
  bool transposed, negative;
  void* to;
};

// Rows that are sampled from images: every down-th line, every right-th pixel of it.
struct Sampling {
  int64_t width, area;  // pixels in a line and in an image of the sample
  int64_t down, right;
  int64_t image_width, image_area;  // of the images it is taken from
};

// The rows themselves; relu(scale * rows + shift); rows where `signs` are open; or p * g + q * y + r with g those.
enum Reading { kRows, kActivation, kMasked, kGradient };

// What a matrix product reads, [pixels, channels], as it is or still to be computed. `mean` is taken off, if given.
struct Operand {
  Reading reading;
  int64_t channels;
  const void *rows, *vectors, *y, *coefficients;
  const uint8_t* signs;
  bool training;
  const void* mean;
  Sampling sampling;
};

// An operand and the packed matrix that it is multiplied by.
struct Factors {
  Operand left;
  const void* right;
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

// out = [start +] first [+ second] [- constant] [+ addend where it is open]. start is in the dtype of the arithmetic.
// With `joins` that is added to out, whose rows are then sampled.
struct Product {
  Tiling tiling;  // of out: a tile is a block
  Factors first, second;
  const void* start;
  const void* constant;
  const void* addend;
  const uint8_t* addend_signs;
  Sampling addend_sampling;
  void* out;
  bool joins;
  Sampling out_sampling;
  bool stream;
  BnStats statistics;        // of out, if its partials are given
  BnActBackwardReduce sums;  // with out as dout, likewise
};

// out = relu(scale * main + shift + shortcut), the shortcut an image, a normalised image or a normalised product.
struct PointwiseTail {
  Tiling tiling;
  Factors main, projection;
  const void *vectors, *skip, *y2, *vectors2;
  void* out;
  uint8_t* signs;
  bool stream;
};

// For every tile left^T right, [channels of left, whole panels], and the sums of left; and
// through = left * packed, as wide as right, as left goes by.
struct Reduction {
  Tiling tiling;  // of left, with stretches of `stretch` channels
  int64_t stretch;
  Operand left, right;
  void *products, *sums;
  const void* packed;
  void* through;
};

// For every tile the product of centred rows with themselves; for every block what they were centred at and what was
// left.
struct MomentsReduction {
  Tiling tiling;
  Operand operand;
  void* products;
  double *centres, *rests;
};

struct MaskedAdd {
  int64_t channels;
  const void* addend;
  const uint8_t* signs;
  Sampling sampling;
  void* out;
};

enum Dtype { kFloat, kHalf, kBFloat16, kDouble, kDtypes };

// Reductions and products take a range of tasks, the others a range of rows. What comes last is memory for this call.
struct Kernels {
  const char* name;
  void (*bn_stats[kDtypes])(const BnStats&, int64_t begin, int64_t end);
  void (*bn_act[kDtypes])(const BnAct&, int64_t begin, int64_t end);
  void (*bn_act_backward_reduce[kDtypes])(const BnActBackwardReduce&, int64_t begin, int64_t end);
  void (*bn_act_backward_apply[kDtypes])(const BnActBackwardApply&, int64_t begin, int64_t end);
  void (*masked_add[kDtypes])(const MaskedAdd&, int64_t begin, int64_t end);
  void (*pack[kDtypes])(const Pack&, int64_t begin, int64_t end);
  void (*product[kDtypes])(const Product&, int64_t begin, int64_t end, void*);
  void (*pointwise_tail[kDtypes])(const PointwiseTail&, int64_t begin, int64_t end, void*);
  void (*reduction[kDtypes])(const Reduction&, int64_t begin, int64_t end, void*);
  void (*moments[kDtypes])(const MomentsReduction&, int64_t begin, int64_t end, void*);
};

// The kernels for this CPU, or for the instruction set that FUSED_RES_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace fused_res::cpu
