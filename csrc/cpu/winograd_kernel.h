// 3x3 convolutions by F(2x2, 3x3), the minimal filtering algorithm (Winograd, 1980; Lavin and Gray, "Fast Algorithms
// for Convolutional Neural Networks", 2016): a tile of 2x2 outputs y follows from the 4x4 inputs d around it as
//
//   y = A' (sum over the channels of (G w G') . (B' d B)) A        16 multiplications for 36
//
// and the gradient of w as G' (sum over the tiles of (A dy A') . (B' d B)) G. A point is one element of what is in
// parentheses: for each there is a product of matrices.
#pragma once

#include "masked_add_kernel.h"
#include "matrix_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// The lines of an image that a line of tiles covers, with zeros around it, in the dtype of the arithmetic.
template <class T, int count>
class Lines {
 public:
  using A = typename Arithmetic<T>::type;

  Lines(const Operand& operand, int64_t height, int64_t width, int64_t left, int64_t padded, int64_t channels,
        Scratch& scratch)
      : operand_(operand),
        height_(height),
        width_(width),
        left_(left),
        padded_(padded),
        row_(scratch_row<A>(channels)),
        memory_(scratch.take<A>(count * padded, channels)) {}

  // Lines `first` to first + count of the image; what is there already stays.
  void read(int64_t image, int64_t first, int64_t from, int64_t channels) {
    for (int64_t y = first; y < first + count; ++y) {
      if (image == image_ && from == from_ && y >= first_ && y < first_ + count) continue;
      A* line = memory_ + (y & (count - 1)) * padded_ * row_;
      if (y < 0 || y >= height_) {
        std::memset(line, 0, padded_ * row_ * sizeof(A));
        continue;
      }
      const int64_t right = left_ + width_;
      std::memset(line, 0, left_ * row_ * sizeof(A));
      std::memset(line + right * row_, 0, (padded_ - right) * row_ * sizeof(A));
      read_rows<T>(operand_, (image * height_ + y) * width_, width_, from, channels, line + left_ * row_, row_);
    }
    image_ = image;
    first_ = first;
    from_ = from;
  }

  // Line i of those.
  const A* operator[](int i) const { return memory_ + ((first_ + i) & (count - 1)) * padded_ * row_; }
  int64_t row() const { return row_; }

 private:
  static_assert((count & (count - 1)) == 0);
  const Operand& operand_;
  int64_t height_, width_, left_, padded_, row_;
  A* memory_;
  int64_t image_ = -1, first_ = 0, from_ = 0;
};

// Filters of more bytes than this are no longer near when they are read again.
constexpr int64_t kNear = 1024 * 1024;

// One more row between the points than there are tiles: theirs do not fall on each other in the cache.
inline int64_t point_rows(const TileGrid& grid) { return grid.block * grid.across + 1; }

// B' d B of a line of tiles.
template <class V, class T, class A>
void input_points(const Lines<T, 4>& lines, int64_t across, int64_t channels, A* to, int64_t point) {
  const int64_t row = lines.row();
  const A* line[4] = {lines[0], lines[1], lines[2], lines[3]};
  for (int64_t c = 0; c < channels; c += V::width) {
    V t[4][4];
    const auto down = [&](int64_t x, int j) {
      const V d0 = V::load(line[0] + x * row + c), d1 = V::load(line[1] + x * row + c);
      const V d2 = V::load(line[2] + x * row + c), d3 = V::load(line[3] + x * row + c);
      t[0][j] = d0 - d2;
      t[1][j] = d1 + d2;
      t[2][j] = d2 - d1;
      t[3][j] = d3 - d1;
    };
    down(0, 0);
    down(1, 1);
    for (int64_t u = 0; u < across; ++u) {
      down(2 * u + 2, 2);
      down(2 * u + 3, 3);
      A* at = to + u * row + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, at += 4 * point) {
        (t[i][0] - t[i][2]).store(at);
        (t[i][1] + t[i][2]).store(at + point);
        (t[i][2] - t[i][1]).store(at + 2 * point);
        (t[i][3] - t[i][1]).store(at + 3 * point);
        t[i][0] = t[i][2];
        t[i][1] = t[i][3];
      }
    }
  }
}

// A dy A' of a line of tiles.
template <class V, class T, class A>
void gradient_points(const Lines<T, 2>& lines, int64_t across, int64_t channels, A* to, int64_t point) {
  const int64_t row = lines.row();
  const A *upper = lines[0], *lower = lines[1];
  for (int64_t u = 0; u < across; ++u) {
    for (int64_t c = 0; c < channels; c += V::width) {
      const int64_t left = 2 * u * row + c, right = left + row;
      const V a = V::load(upper + left), b = V::load(upper + right);
      const V e = V::load(lower + left), f = V::load(lower + right);
      const V lefts[4] = {a, a + e, a - e, e}, rights[4] = {b, b + f, b - f, f};
      A* at = to + u * row + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, at += 4 * point) {
        lefts[i].store(at);
        (lefts[i] + rights[i]).store(at + point);
        (lefts[i] - rights[i]).store(at + 2 * point);
        rights[i].store(at + 3 * point);
      }
    }
  }
}

// A' m A of a line of tiles: pixels of one or two lines of `width` pixels, so many channels of rows of `stride`.
template <class V, class T, class A>
void output_pixels(const A* from, int64_t point, int64_t row, int64_t channels, int64_t width, bool second, T* to,
                   int64_t stride) {
  for (int64_t x = 0; x < width; x += 2, from += row) {
    T *upper = to + x * stride, *lower = upper + width * stride;
    const bool pair = x + 1 < width;
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      V sums[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const A* at = from + j * point + c;
        const V m1 = V::load(at + 4 * point), m2 = V::load(at + 8 * point);
        sums[0][j] = V::load(at) + m1 + m2;
        sums[1][j] = m1 - m2 + V::load(at + 12 * point);
      }
      store(upper + c, sums[0][0] + sums[0][1] + sums[0][2], lanes);
      if (pair) store(upper + stride + c, sums[0][1] - sums[0][2] + sums[0][3], lanes);
      if (!second) return;
      store(lower + c, sums[1][0] + sums[1][1] + sums[1][2], lanes);
      if (pair) store(lower + stride + c, sums[1][1] - sums[1][2] + sums[1][3], lanes);
    });
  }
}

// The first pixel of a line of tiles.
inline int64_t first_pixel(const TileGrid& grid, int64_t line) {
  return (line / grid.lines * grid.out_height + line % grid.lines * 2) * grid.out_width;
}

// Has the lines of images that a block of tiles adds to those before it fetched ahead.
template <class T>
inline void want_lines(Ahead& ahead, const Operand& operand, const TileGrid& grid, int64_t line) {
  if (line >= grid.images * grid.lines) return;
  const int64_t top = min(line % grid.lines * 2 - grid.above + 2, grid.height - 1);
  const int64_t first = (line / grid.lines * grid.height + (top < 0 ? 0 : top)) * grid.width;
  const int64_t n = min(2 * grid.block * grid.width, grid.images * grid.height * grid.width - first);
  want_rows<T>(ahead, operand, first, n);
}

// What is still to be done with rows first to last of out, channels from to from + columns, after they were stored.
template <class T>
void finish_rows(const Winograd& a, int64_t first, int64_t last, int64_t from, int64_t columns) {
  using A = typename Arithmetic<T>::type;
  const int64_t channels = a.tiling.channels, bytes = (channels + 7) / 8;
  const auto vector = [&](const void* vectors, int64_t i) {
    return vectors == nullptr ? nullptr : static_cast<const A*>(vectors) + i * channels + from;
  };
  const A *scale = vector(a.finish.vectors, 3), *shift = vector(a.finish.vectors, 4);
  const A *scale2 = vector(a.finish.vectors2, 3), *shift2 = vector(a.finish.vectors2, 4);
  const T *skip = static_cast<const T*>(a.finish.skip), *y2 = static_cast<const T*>(a.finish.y2);
  for (int64_t p = first; p < last; ++p) {
    const int64_t at = p * channels + from;
    T* out = static_cast<T*>(a.out) + at;
    const int64_t added = a.joins.addend == nullptr ? -1 : sampled_row(a.joins.sampling, p);
    if (added >= 0) {
      masked_add_row(columns, out, static_cast<const T*>(a.joins.addend) + added * channels + from,
                     a.joins.signs == nullptr ? nullptr : a.joins.signs + added * bytes + from / 8, out);
    }
    if (scale == nullptr) continue;
    if (skip != nullptr) {
      bn_act_row<T, kSkip>(columns, out, scale, shift, skip + at, scale2, shift2, out, nullptr);
    } else if (y2 != nullptr) {
      bn_act_row<T, kSecond>(columns, out, scale, shift, y2 + at, scale2, shift2, out, nullptr);
    } else {
      bn_act_row<T, kNone>(columns, out, scale, shift, out, scale2, shift2, out, nullptr);
    }
  }
}

// A task is a block of tiles and a stretch of out's channels.
template <class T>
void winograd(const Winograd& a, int64_t begin, int64_t end, void* memory) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const TileGrid& grid = a.grid;
  const int64_t channels = a.tiling.channels, stretches = a.tiling.stretches, depth = a.operand.channels;
  const int64_t widest = min(channels, kStretch), row = scratch_row<A>(depth), to_row = scratch_row<A>(widest);
  const int64_t filter_point = filter_elements(depth, channels);
  Scratch scratch(memory);
  A* read = scratch.take<A>(kPoints * point_rows(grid), depth);
  A* multiplied = scratch.take<A>(kPoints * point_rows(grid), widest);
  const int64_t point = point_rows(grid) * row, to_point = point_rows(grid) * to_row;
  const bool far = kPoints * filter_point * static_cast<int64_t>(sizeof(A)) > kNear;
  Lines<T, 4> lines(a.operand, grid.height, grid.width, grid.left, 2 * grid.across + 2, depth, scratch);
  int64_t block = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t top = task / stretches * grid.block, bottom = min(top + grid.block, grid.images * grid.lines);
    const int64_t from = task % stretches * kStretch, columns = min(kStretch, channels - from);
    const int64_t tiles = (bottom - top) * grid.across;
    const int64_t first = first_pixel(grid, top), last = first_pixel(grid, bottom);
    Ahead ahead;
    if (task / stretches != block) {
      for (int64_t i = top; i < bottom; ++i) {
        lines.read(i / grid.lines, i % grid.lines * 2 - grid.above, 0, depth);
        input_points<V>(lines, grid.across, depth, read + (i - top) * grid.across * row, point);
      }
      block = task / stretches;
      want_lines<T>(ahead, a.operand, grid, bottom);
      ahead.want(static_cast<const T*>(a.out) + first * channels, (last - first) * channels * sizeof(T));
      ahead.spread(kPoints * product_steps<V>(tiles, depth, columns));
    }
    for (int64_t i = 0; i < kPoints; ++i) {
      const A* filter = static_cast<const A*>(a.filter) + i * filter_point + from * depth;
      multiply<V>(tiles, depth, whole_panels<V>(columns), read + i * point, row, filter, multiplied + i * to_point,
                  to_row, false, ahead, far ? filter + filter_point : nullptr);
    }
    for (int64_t i = top; i < bottom; ++i) {
      output_pixels<V>(multiplied + (i - top) * grid.across * to_row, to_point, to_row, columns, grid.out_width,
                       i % grid.lines * 2 + 1 < grid.out_height,
                       static_cast<T*>(a.out) + first_pixel(grid, i) * channels + from, channels);
    }
    finish_rows<T>(a, first, last, from, columns);
    if (a.statistics.partials != nullptr) bn_stats<T>(a.statistics, task, task + 1);
    if (a.sums.partials != nullptr) bn_act_backward_reduce<T>(a.sums, task, task + 1);
  }
}

// A task is a tile of blocks, a stretch of left's channels and one of right's.
template <class T>
void winograd_wgrad(const WinogradWgrad& a, int64_t begin, int64_t end, void* memory) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const TileGrid& grid = a.grid;
  const int64_t row = scratch_row<A>(a.stretch), point = point_rows(grid) * row, products = a.stretch * a.stretch;
  Scratch scratch(memory);
  A* left = scratch.take<A>(kPoints * point_rows(grid), a.stretch);
  A* right = scratch.take<A>(kPoints * point_rows(grid), a.stretch);
  Lines<T, 2> gradients(a.left, grid.out_height, grid.out_width, 0, 2 * grid.across, a.stretch, scratch);
  Lines<T, 4> inputs(a.right, grid.height, grid.width, grid.left, 2 * grid.across + 2, a.stretch, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t from = task / a.rights % a.lefts * a.stretch, channels = min(a.stretch, a.left.channels - from);
    const int64_t in_from = task % a.rights * a.stretch, in_channels = min(a.stretch, a.right.channels - in_from);
    const int64_t top = task / a.rights / a.lefts * a.blocks * grid.block;
    const int64_t bottom = min(top + a.blocks * grid.block, grid.images * grid.lines);
    A* to = static_cast<A*>(a.products) + task * kPoints * products;
    std::memset(to, 0, kPoints * products * sizeof(A));
    for (int64_t seen = top; seen < bottom; seen += grid.block) {
      const int64_t more = min(seen + grid.block, bottom), tiles = (more - seen) * grid.across;
      for (int64_t i = seen; i < more; ++i) {
        const int64_t image = i / grid.lines, line = i % grid.lines * 2, at = (i - seen) * grid.across * row;
        gradients.read(image, line, from, channels);
        gradient_points<V>(gradients, grid.across, channels, left + at, point);
        inputs.read(image, line - grid.above, in_from, in_channels);
        input_points<V>(inputs, grid.across, in_channels, right + at, point);
      }
      Ahead ahead;
      if (a.lefts == 1 && a.rights == 1) {
        const int64_t first = first_pixel(grid, more), last = first_pixel(grid, min(more + grid.block, bottom));
        want_rows<T>(ahead, a.left, first, last - first);
        want_lines<T>(ahead, a.right, grid, more);
        ahead.spread(kPoints * product_steps<V>(channels, tiles, in_channels));
      }
      for (int64_t i = 0; i < kPoints; ++i) {
        add_transposed_product<V>(tiles, channels, whole_panels<V>(in_channels), left + i * point, row,
                                  right + i * point, row, to + i * products, a.stretch, false, ahead);
      }
    }
  }
}

// Rows of dweight: G' m G.
template <class T>
void winograd_dweight(const WinogradWgrad& a, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const int64_t in = a.right.channels, products = a.stretch * a.stretch, tile = a.lefts * a.rights * kPoints * products;
  const V half = V::set(0.5f);
  for (int64_t o = begin; o < end; ++o) {
    T* to = static_cast<T*>(a.dweight) + o * 9 * in;
    const A* row = static_cast<const A*>(a.products) + o / a.stretch * a.rights * kPoints * products;
    for_channels<V::width>(in, [&](int64_t c, auto lanes) {
      const A* from = row + c / a.stretch * kPoints * products + o % a.stretch * a.stretch + c % a.stretch;
      V m[4][4], t[3][4];
#pragma GCC unroll 16
      for (int i = 0; i < kPoints; ++i) {
        V sum = V::load(from + i * products);
        for (int64_t j = 1; j < a.tiles; ++j) sum = sum + V::load(from + i * products + j * tile);
        m[i / 4][i % 4] = sum;
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const V sum = (m[1][j] + m[2][j]) * half;
        t[0][j] = m[0][j] + sum;
        t[1][j] = (m[1][j] - m[2][j]) * half;
        t[2][j] = sum + m[3][j];
      }
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const V sum = (t[i][1] + t[i][2]) * half;
        store(to + 3 * i * in + c, t[i][0] + sum, lanes);
        store(to + (3 * i + 1) * in + c, (t[i][1] - t[i][2]) * half, lanes);
        store(to + (3 * i + 2) * in + c, sum + t[i][3], lanes);
      }
    });
  }
}

// G w G' of a vector of channels, whose taps are `step` apart.
template <class V, class T, class Lanes, class A>
inline void filter_points(const T* w, int64_t step, Lanes lanes, A* to, int64_t point) {
  const V half = V::set(0.5f);
  V t[4][3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const V w0 = load<V>(w + j * step, lanes), w1 = load<V>(w + (3 + j) * step, lanes);
    const V w2 = load<V>(w + (6 + j) * step, lanes), sum = (w0 + w2) * half, middle = w1 * half;
    t[0][j] = w0;
    t[1][j] = sum + middle;
    t[2][j] = sum - middle;
    t[3][j] = w2;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += 4 * point) {
    const V sum = (t[i][0] + t[i][2]) * half, middle = t[i][1] * half;
    t[i][0].store(to);
    (sum + middle).store(to + point);
    (sum - middle).store(to + 2 * point);
    t[i][2].store(to + 3 * point);
  }
}

// The taps [9, width of `in`, n <= width of `out`] of some filters, one after the other in memory, turned.
template <class V, class T, class Lanes, class A>
inline void turned_taps(const T* w, int64_t in, int64_t n, Lanes lanes, A* to) {
  for (int tap = 0; tap < 9; ++tap, w += in, to += V::width * V::width) {
    V rows[V::width];
    for (int o = 0; o < V::width; ++o) rows[o] = o < n ? load<V>(w + o * 9 * in, lanes) : V::set(0);
    transpose(rows);
    for (int c = 0; c < V::width; ++c) rows[c].store(to + c * V::width);
  }
}

// A task is a panel of columns and as many rows.
template <class T>
void winograd_filter(const WinogradFilter& f, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  constexpr int64_t panel = Tile<V>::panel;
  const int64_t depth = f.backwards ? f.out : f.in, columns = f.backwards ? f.in : f.out;
  const int64_t point = filter_elements(depth, columns), chunks = (depth + kPanel - 1) / kPanel;
  const T* weight = static_cast<const T*>(f.weight);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % chunks * kPanel, rows = min(kPanel, depth - first);
    const int64_t from = task / chunks * kPanel, last = min(columns, from + kPanel);
    // Columns past the last are written as well: there is a whole panel.
    for (int64_t column = from; column < last; column += V::width) {
      A* to = static_cast<A*>(f.to) + column / panel * panel * depth + first * panel + column % panel;
      const int64_t n = min(V::width, last - column);
      for (int64_t t = 0; f.backwards && t < rows; ++t) {
        const T* last_tap = weight + ((first + t) * 9 + 8) * f.in + column;
        for_channels<V::width>(
            n, [&](int64_t, auto lanes) { filter_points<V>(last_tap, -f.in, lanes, to + t * panel, point); });
      }
      if (f.backwards) continue;
      for_channels<V::width>(rows, [&](int64_t c, auto lanes) {
        alignas(64) A taps[9 * V::width * V::width];
        turned_taps<V>(weight + column * 9 * f.in + first + c, f.in, n, lanes, taps);
        for (int64_t t = c; t < min(c + V::width, rows); ++t) {
          filter_points<V>(taps + (t - c) * V::width, V::width * V::width, Full{}, to + t * panel, point);
        }
      });
    }
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
