// The unstrided 3x3 convolutions on the CPU, by F(2x2, 3x3).
#include "../convolution_checks.h"
#include "products.h"

namespace fused_res::cpu {
namespace {

// Bytes of the points of a block of tiles, about: they stay in the cache between the products that make and use them.
constexpr int64_t kPointBytes = 512 * 1024;
// Tiles of a block, at least: every block reads all filters.
constexpr int64_t kBlockTiles = 64;
// Channels of a stretch of the gradient of the filters, at most: its products stay in the cache.
constexpr int64_t kWgradStretch = 128;

struct Padding {
  int64_t down, right;
};

// Blocks of tiles that have `channels` channels of points in all. All blocks but the last come out with as many rows,
// unless an odd line ends an image that is too large for a block.
TileGrid tile_grid(const Tensor& image, Padding padding, int64_t channels) {
  const int64_t out_height = image.size(1) + 2 * padding.down - 2, out_width = image.size(2) + 2 * padding.right - 2;
  TileGrid grid{image.size(0),
                image.size(1),
                image.size(2),
                padding.down,
                padding.right,
                out_height,
                out_width,
                divide_up(out_height, 2),
                divide_up(out_width, 2),
                1};
  const int64_t line = kPoints * channels * grid.across * arithmetic_size(image);
  const int64_t least = divide_up(kBlockTiles, std::max<int64_t>(1, grid.across)), all = grid.images * grid.lines;
  const int64_t most = std::max(least, kPointBytes / std::max<int64_t>(1, line));
  if (out_height % 2 == 0) {
    grid.block = std::max<int64_t>(1, divide_up(all, divide_up(all, most)));
  } else if (grid.lines <= 2 * most) {
    grid.block = grid.lines * std::clamp<int64_t>(most / grid.lines, 1, std::max<int64_t>(1, grid.images));
  } else {
    grid.block = most;
  }
  return grid;
}

// Rows of out of every block but the last, or none where they differ.
int64_t rows_of_blocks(const TileGrid& grid) {
  if (grid.out_height % 2 == 0) return 2 * grid.block * grid.out_width;
  return grid.block % grid.lines == 0 ? grid.block / grid.lines * grid.out_height * grid.out_width : 0;
}

int64_t point_elements(const TileGrid& grid, int64_t channels) {
  return block_elements(kPoints * (grid.block * grid.across + 1), channels);
}

// `count` lines of an image, padded.
int64_t line_elements(const TileGrid& grid, int64_t count, int64_t channels) {
  return block_elements(count * (2 * grid.across + 2), channels);
}

void transform(const Tensor& weight, bool backwards, void* to) {
  const int64_t out = weight.size(0), in = weight.size(3);
  const int64_t depth = backwards ? out : in, columns = backwards ? in : out;
  const WinogradFilter arguments{out, in, data(weight), backwards, to};
  torch::stable::parallel_for(
      0, divide_up(columns, kPanel) * divide_up(depth, kPanel), 1,
      [&](int64_t begin, int64_t end) { kernels().winograd_filter[dtype_of(weight)](arguments, begin, end); });
}

// In memory that stays: for as long as nobody else asks for partial_memory.
const void* filter(const Tensor& weight, bool backwards) {
  const int64_t out = weight.size(0), in = weight.size(3);
  const int64_t elements = backwards ? filter_elements(out, in) : filter_elements(in, out);
  void* to = partial_memory.get(kPoints * elements * arithmetic_size(weight));
  transform(weight, backwards, to);
  return to;
}

// The filters' points, to be kept.
Tensor prepare(const Tensor& weight) {
  check_prepared_filter(weight);
  const int64_t out = weight.size(0), in = weight.size(3);
  const Tensor points = fresh_statistics(weight, {kPoints * filter_elements(in, out)});
  transform(weight, false, output(points));
  return points;
}

// Runs the convolution whose filter, out and finish `a` has, on rows [pixels, channels] of out. `statistics` and `sums`
// are filled in and reduced, with the blocks or after them.
OptionalTensor run(Winograd& a, const TileGrid& grid, const Operand& operand, const Tensor& out, bool statistics,
                   bool sums, int64_t& rows) {
  const int64_t pixels = out.size(0) * out.size(1) * out.size(2), channels = out.size(3), depth = operand.channels;
  const int64_t stretches = divide_up(channels, kStretch), size = arithmetic_size(out);
  const Tiling separate = tiling(pixels, channels, out.element_size());
  const int64_t blocks = divide_up(grid.images * grid.lines, grid.block);
  rows = rows_of_blocks(grid);
  const bool together = rows > 0;
  a.grid = grid;
  a.operand = operand;
  a.tiling = together ? Tiling{pixels, channels, separate.block, rows, blocks, stretches} : separate;
  rows = a.tiling.rows;
  OptionalTensor partials;
  if (statistics || sums) partials = fresh_statistics(out, {a.tiling.tiles, 2, channels});
  BnStats of_out{a.tiling, data(out), output(partials)};
  BnActBackwardReduce below = a.sums;
  below.tiling = a.tiling;
  below.dout = data(out);
  below.partials = output(partials);
  a.sums = {};
  if (together && statistics) a.statistics = of_out;
  if (together && sums) a.sums = below;
  run_products(kernels().winograd[dtype_of(out)], a, blocks * stretches,
               (point_elements(grid, depth) + point_elements(grid, std::min(channels, kStretch)) +
                line_elements(grid, 4, depth)) *
                   size);
  if (!together && statistics) run_tasks(kernels().bn_stats[dtype_of(out)], of_out);
  if (!together && sums) run_tasks(kernels().bn_act_backward_reduce[dtype_of(out)], below);
  return partials;
}

// y, and where asked for its partial statistics and the rows of their tiles. With vectors what is left of the block
// follows.
std::tuple<Tensor, OptionalTensor, int64_t> fprop(const Tensor& x, const OptionalTensor& x_vectors,
                                                  const Tensor& weight, int64_t down, int64_t right, bool statistics,
                                                  const OptionalTensor& vectors, const OptionalTensor& skip,
                                                  const OptionalTensor& y2, const OptionalTensor& vectors2) {
  check_winograd_fprop(x, x_vectors, weight, down, right, statistics, vectors, skip, y2, vectors2);
  const int64_t channels = weight.size(0);
  const TileGrid grid = tile_grid(x, {down, right}, x.size(3) + std::min(channels, kStretch));
  const Tensor y = new_tensor(x, {grid.images, grid.out_height, grid.out_width, channels});
  Winograd arguments{};
  arguments.filter = filter(weight, false);
  arguments.out = output(y);
  arguments.finish = {channels,       data(y),   data(vectors), data(skip), data(y2),
                      data(vectors2), output(y), nullptr,       false};
  int64_t rows = 0;
  const OptionalTensor partials = run(arguments, grid, activation(x, x_vectors, 1, 1), y, statistics, false, rows);
  return {y, partials, rows};
}

// relu(scale * y + shift [+ skip]) on points that were prepared.
Tensor bn_act(const Tensor& x, const Tensor& points, int64_t channels, int64_t down, int64_t right,
              const Tensor& vectors, const OptionalTensor& skip) {
  check_winograd_bn_act(x, channels, down, right, vectors, skip);
  check("points", points, {kPoints * filter_elements(x.size(3), channels)}, statistics_dtype(x.scalar_type()), x);
  const TileGrid grid = tile_grid(x, {down, right}, x.size(3) + std::min(channels, kStretch));
  const Tensor y = torch::stable::new_empty(x, {grid.images, grid.out_height, grid.out_width, channels});
  Winograd arguments{};
  arguments.filter = data(points);
  arguments.out = output(y);
  arguments.finish = {channels, data(y), data(vectors), data(skip), nullptr, nullptr, output(y), nullptr, false};
  int64_t rows = 0;
  run(arguments, grid, activation(x, {}, 1, 1), y, false, false, rows);
  return y;
}

// dx, images [N, H, W, C], and where asked for the partial sums of the BN below.
std::tuple<Tensor, OptionalTensor> dgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
                                         const OptionalTensor& coefficients, const OptionalTensor& signs, bool training,
                                         const Tensor& weight, int64_t down, int64_t right, const OptionalTensor& inner,
                                         const OptionalTensor& inner_vectors, const OptionalTensor& addend,
                                         const OptionalTensor& addend_signs, int64_t addend_down,
                                         int64_t addend_right) {
  check_winograd_dgrad(dy, y, vectors, coefficients, signs, weight, down, right, inner, inner_vectors, addend);
  const int64_t channels = weight.size(3);
  const TileGrid grid = tile_grid(dy, {2 - down, 2 - right}, dy.size(3) + std::min(channels, kStretch));
  const Tensor dx = new_tensor(dy, {grid.images, grid.out_height, grid.out_width, channels});
  Winograd arguments{};
  if (addend) {
    check_addend(dx, *addend, addend_signs, addend_down, addend_right);
    arguments.joins = {channels, data(*addend), static_cast<const uint8_t*>(data(addend_signs)),
                       sampling_of(dx, addend_down, addend_right), output(dx)};
  }
  arguments.filter = filter(weight, true);
  arguments.out = output(dx);
  if (inner) arguments.sums = {{}, nullptr, data(inner), data(inner_vectors), nullptr, nullptr, nullptr, nullptr};
  int64_t rows = 0;
  const OptionalTensor partials =
      run(arguments, grid, gradient(dy, y, vectors, coefficients, signs, training), dx, false, inner.has_value(), rows);
  return {dx, partials};
}

Tensor wgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
             const OptionalTensor& coefficients, const OptionalTensor& signs, bool training, const Tensor& x,
             const OptionalTensor& x_vectors, int64_t down, int64_t right) {
  check_winograd_wgrad(dy, y, vectors, coefficients, signs, x, x_vectors, down, right);
  const int64_t out = dy.size(3), in = x.size(3), size = arithmetic_size(dy);
  const Tensor dweight = new_tensor(dy, {out, 3, 3, in});
  WinogradWgrad arguments{};
  arguments.stretch = std::min(kWgradStretch, whole_panels(std::max(out, in)));
  arguments.lefts = divide_up(out, arguments.stretch);
  arguments.rights = divide_up(in, arguments.stretch);
  arguments.grid = tile_grid(x, {down, right}, 2 * arguments.stretch);
  const TileGrid& grid = arguments.grid;
  const int64_t blocks = std::max<int64_t>(1, divide_up(grid.images * grid.lines, grid.block));
  const int64_t tasks = arguments.lefts * arguments.rights;
  const int64_t bytes = tasks * kPoints * arguments.stretch * arguments.stretch * size;
  arguments.blocks = divide_up(blocks, std::clamp<int64_t>(kPartialBytes / bytes, 1, kTiles));
  arguments.tiles = divide_up(blocks, arguments.blocks);
  arguments.left = gradient(dy, y, vectors, coefficients, signs, training);
  arguments.right = activation(x, x_vectors, 1, 1);
  arguments.products = partial_memory.get(arguments.tiles * bytes);
  arguments.dweight = output(dweight);
  run_products(kernels().winograd_wgrad[dtype_of(dy)], arguments, arguments.tiles * tasks,
               (2 * point_elements(grid, arguments.stretch) + line_elements(grid, 6, arguments.stretch)) * size);
  const int64_t grain = std::max<int64_t>(1, kGrain / (kPoints * in * arguments.tiles));
  torch::stable::parallel_for(0, out, grain, [&](int64_t begin, int64_t end) {
    kernels().winograd_dweight[dtype_of(dy)](arguments, begin, end);
  });
  return dweight;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "winograd_fprop", TORCH_BOX(&fprop));
  implement(m, "winograd_dgrad", TORCH_BOX(&dgrad));
  implement(m, "winograd_wgrad", TORCH_BOX(&wgrad));
  implement(m, "winograd_prepare", TORCH_BOX(&prepare));
  implement(m, "winograd_bn_act", TORCH_BOX(&bn_act));
}

}  // namespace
}  // namespace fused_res::cpu
