// What the launchers hand to the CPU kernels: plain structs, and one table of functions for each instruction set.
//
// The kernels are compiled once for each instruction set (variant.cpp) and include nothing of torch or of the C++
// library: an inline function compiled there for AVX-512 could otherwise be the copy that the linker keeps for
// everybody.
#pragma once

#include <cstdint>

#include "../vectors.h"

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
  bool relu = true;
};

struct Relu {
  int64_t channels;
  void* image;
};

// One direction of pooling: the window, and how many there are in images of this size.
struct PoolSteps {
  int64_t taps, stride, padding, dilation, size, windows;
};

// Images [N, H, W, C] as their windows' maxima.
struct MaxPool {
  int64_t channels;
  PoolSteps rows, columns;
  const void* image;
  void* out;
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

// out, sampled, gains the addend where the signs are open.
struct MaskedAdd {
  int64_t channels;
  const void* addend;
  const uint8_t* signs;
  Sampling sampling;
  void* out;
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
// Without the ReLU the shortcut is an image or missing.
struct PointwiseTail {
  Tiling tiling;
  Factors main, projection;
  const void *vectors, *skip, *y2, *vectors2;
  void* out;
  uint8_t* signs;
  bool stream;
  bool relu = true;
};

// For every tile of rows the product left^T right, [channels of left, whole panels], and the sums of left. While a
// block of left is in the cache it is also multiplied by another matrix: through = left * packed, as wide as right.
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

// For every row w of a weight [channels, depth] its forms with m and G, the mean and the packed covariance, and whether
// w'Gw is less than `ratio` of the most it could be: of (|w| deviations)^2, with those the roots of G's diagonal. A
// task is a block of rows. Without `packed` the rows have no forms.
struct Spread {
  int64_t channels, depth, block;
  const void* weight;
  const double *mean, *deviations;
  const void* packed;
  double ratio;
  double *means, *vars;  // not wanted if null
  uint8_t* suspect;
};

// What the backward of a 1x1 convolution and its BN has for each row of the weight, from `totals` and `products` over
// the pixels; the rows that are suspect take their sum from `direct`, if given. With `constants`, partial sums [blocks,
// depth] of total / pixels * A, also the factors of B: shares = d * invstd / pixels * A, and the weight, where it is
// narrower, in the dtype of the arithmetic.
struct TailGradients {
  Spread spread;
  double pixels;
  const double *totals, *products, *direct;
  const void *vectors, *scaled;
  void* dweight;
  double *d, *constants;
  void *shares, *wide;
};

// Points of F(2x2, 3x3): elements of a tile of 4x4.
constexpr int kPoints = 16;

// Elements from one point of packed filters to the next: a cache line more than there are, so that the points do not
// fall on each other in the cache.
static constexpr int64_t filter_elements(int64_t depth, int64_t columns) {
  return (columns + kPanel - 1) / kPanel * kPanel * depth + 16;
}

// How images of height x width pixels, with so many zero lines above and zero pixels left of them, become tiles of 4x4
// pixels, each two pixels on from the one before, and those become 2x2 pixels of images of out_height x out_width.
struct TileGrid {
  int64_t images, height, width, above, left, out_height, out_width;
  int64_t lines, across;  // lines of tiles in an image, tiles in a line
  int64_t block;          // lines of tiles that are taken together, of one image or of more
};

// The filters of a 3x3 convolution, [out, 3, 3, in], in the 16 points of F(2x2, 3x3), each packed for products:
// [in, out], or of the gradient's convolution, whose taps run backwards, [out, in].
struct WinogradFilter {
  int64_t out, in;
  const void* weight;
  bool backwards;
  void* to;
};

// A 3x3 convolution by F(2x2, 3x3), and what is to be done with the blocks of its output.
struct Winograd {
  Tiling tiling;  // of out; tiles of so many rows are blocks, where that is true of all of them
  TileGrid grid;
  Operand operand;
  const void* filter;
  void* out;
  MaskedAdd joins;           // if its addend is given
  BnStats statistics;        // of out, if its partials are given
  BnActBackwardReduce sums;  // with out as dout, likewise
  BnAct finish;              // of out, in place, if its vectors are given
};

// The gradient of the filters, [out, 3, 3, in]: in those points for tiles of so many blocks, then of all tiles
// together. left is the output's gradient, right the input, both cut into stretches of `stretch` channels, whole
// panels.
struct WinogradWgrad {
  TileGrid grid;
  int64_t tiles, blocks;  // tiles, and blocks in each
  int64_t stretch, lefts, rights;
  Operand left, right;
  void* products;  // [tiles, lefts, rights, points, stretch, stretch]
  void* dweight;
};

enum Dtype { kFloat, kHalf, kBFloat16, kDouble, kDtypes };

// Reductions and products take a range of tasks, the others a range of rows. What comes last is memory for this call.
struct Kernels {
  const char* name;
  void (*bn_stats[kDtypes])(const BnStats&, int64_t begin, int64_t end);
  void (*bn_act[kDtypes])(const BnAct&, int64_t begin, int64_t end);
  void (*relu[kDtypes])(const Relu&, int64_t begin, int64_t end);
  void (*max_pool[kDtypes])(const MaxPool&, int64_t begin, int64_t end);
  void (*bn_act_backward_reduce[kDtypes])(const BnActBackwardReduce&, int64_t begin, int64_t end);
  void (*bn_act_backward_apply[kDtypes])(const BnActBackwardApply&, int64_t begin, int64_t end);
  void (*masked_add[kDtypes])(const MaskedAdd&, int64_t begin, int64_t end);
  void (*pack[kDtypes])(const Pack&, int64_t begin, int64_t end);
  void (*product[kDtypes])(const Product&, int64_t begin, int64_t end, void*);
  void (*pointwise_tail[kDtypes])(const PointwiseTail&, int64_t begin, int64_t end, void*);
  void (*reduction[kDtypes])(const Reduction&, int64_t begin, int64_t end, void*);
  void (*moments[kDtypes])(const MomentsReduction&, int64_t begin, int64_t end, void*);
  void (*spread[kDtypes])(const Spread&, int64_t begin, int64_t end, void*);
  void (*tail_gradients[kDtypes])(const TailGradients&, int64_t begin, int64_t end, void*);
  void (*winograd_filter[kDtypes])(const WinogradFilter&, int64_t begin, int64_t end);
  void (*winograd[kDtypes])(const Winograd&, int64_t begin, int64_t end, void*);
  void (*winograd_wgrad[kDtypes])(const WinogradWgrad&, int64_t begin, int64_t end, void*);
  void (*winograd_dweight[kDtypes])(const WinogradWgrad&, int64_t begin, int64_t end);
};

// The kernels for this CPU, or for the instruction set that FUSED_RES_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace fused_res::cpu
