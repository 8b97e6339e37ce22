// Runs every CPU kernel of one instruction set on buffers of exactly the right size, for a build with sanitizers: a
// read or write past an end, or an operation without a meaning, ends the process.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <vector>

#include "cpu/kernels.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {
extern const Kernels table;
}

namespace {

using namespace fused_res::cpu;

// Memory of its own, that starts one element after an aligned address.
class Buffer {
 public:
  Buffer(int64_t elements, int64_t item) : bytes_(static_cast<char*>(std::malloc((elements + 1) * item))), item_(item) {
    for (int64_t i = 0; i < (elements + 1) * item; ++i) bytes_[i] = static_cast<char>(std::rand() & 0x3b);
  }
  ~Buffer() { std::free(bytes_); }
  Buffer(const Buffer&) = delete;
  void* data() { return bytes_ + item_; }

 private:
  char* bytes_;
  int64_t item_;
};

void run(Dtype dtype, int64_t pixels, int64_t channels, int64_t block, int64_t tiles) {
  const auto& table = FUSED_RES_VARIANT::table;
  const int64_t item = dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2, wide = dtype == kDouble ? 8 : 4;
  const int64_t rows = block * ((pixels + block * tiles - 1) / (block * tiles));
  const Tiling tiling{pixels, channels, block, rows, (pixels + rows - 1) / rows, (channels + kStretch - 1) / kStretch};
  const int64_t tasks = tiling.tiles * tiling.stretches, size = pixels * channels;
  Buffer y(size, item), y2(size, item), dout(size, item), out(size, item), out2(size, item), out3(size, item);
  Buffer vectors(5 * channels, wide), vectors2(5 * channels, wide), c(7 * channels, wide), c2(7 * channels, wide);
  Buffer signs(pixels * ((channels + 7) / 8), 1), partials(tiling.tiles * 3 * channels, wide);
  uint8_t* bits = static_cast<uint8_t*>(signs.data());

  table.bn_stats[dtype]({tiling, y.data(), partials.data()}, 0, tasks);
  for (int shortcut = 0; shortcut < 3; ++shortcut) {
    const BnAct act{channels,
                    y.data(),
                    vectors.data(),
                    shortcut == 1 ? y2.data() : nullptr,
                    shortcut == 2 ? y2.data() : nullptr,
                    shortcut == 2 ? vectors2.data() : nullptr,
                    out.data(),
                    shortcut == 0 ? nullptr : bits,
                    false};
    table.bn_act[dtype](act, 0, pixels);
  }
  for (int mode = 0; mode < 3; ++mode) {
    const bool outer = mode > 0, second = mode > 1;
    table.bn_act_backward_reduce[dtype](
        {tiling, dout.data(), y.data(), vectors.data(), outer ? bits : nullptr, second ? y2.data() : nullptr,
         second ? vectors2.data() : nullptr, partials.data()},
        0, tasks);
    table.bn_act_backward_apply[dtype](
        {channels, dout.data(), y.data(), vectors.data(), c.data(), outer ? bits : nullptr, true,
         second ? y2.data() : nullptr, second ? c2.data() : nullptr, second, out.data(), second ? out2.data() : nullptr,
         outer ? out3.data() : nullptr, false},
        0, pixels);
  }
}

// Windows of two images, the last of them beyond the padding.
void pool(Dtype dtype, int64_t channels, const PoolSteps& rows, const PoolSteps& columns) {
  const auto& table = FUSED_RES_VARIANT::table;
  const int64_t item = dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2, pixels = 2 * rows.windows * columns.windows;
  Buffer image(2 * rows.size * columns.size * channels, item), out(pixels * channels, item);
  table.relu[dtype]({channels, image.data()}, 0, 2 * rows.size * columns.size);
  table.max_pool[dtype]({channels, rows, columns, image.data(), out.data()}, 0, pixels);
}

int64_t whole_panels(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// The kernels that multiply matrices: [pixels, inner] and [pixels, outer], every second pixel of a line of the former.
void multiply(Dtype dtype, int64_t pixels, int64_t inner, int64_t outer, int64_t block) {
  const auto& table = FUSED_RES_VARIANT::table;
  const int64_t item = dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2, wide = dtype == kDouble ? 8 : 4;
  const int64_t blocks = (pixels + block - 1) / block, stretches = (outer + kStretch - 1) / kStretch;
  const auto memory = [&](int64_t channels) { return block * (whole_panels(channels) + 64 / wide); };
  Buffer z((2 * pixels - 1) * inner, item), whole(pixels * inner, item), dz(pixels * inner, item);
  Buffer weight(outer * inner, item), y(pixels * outer, item), y2(pixels * outer, item), out(pixels * outer, item);
  Buffer z_vectors(5 * inner, wide), vectors(5 * outer, wide), c(7 * outer, wide), mean(inner, wide);
  Buffer start(pixels * inner, wide), through(pixels * inner, wide), signs(pixels * ((outer + 7) / 8), 1),
      inner_signs(pixels * ((inner + 7) / 8), 1);
  Buffer across(inner * whole_panels(outer), wide), back(outer * whole_panels(inner), wide);
  Buffer partials(blocks * 2 * outer, wide), inner_partials(blocks * 2 * inner, wide);
  Buffer products(blocks * outer * whole_panels(inner), wide), sums(blocks * outer, wide);
  Buffer squares(inner * whole_panels(inner), wide), centres(blocks * inner, 8), rests(blocks * inner, 8);
  uint8_t* bits = static_cast<uint8_t*>(signs.data());

  Operand activation{}, masked{}, gradient{};
  activation.reading = kActivation;
  activation.channels = inner;
  activation.rows = z.data();
  activation.vectors = z_vectors.data();
  activation.sampling = {pixels, pixels, 1, 2, 2 * pixels - 1, 2 * pixels - 1};
  masked.reading = kMasked;
  masked.channels = outer;
  masked.rows = y.data();
  masked.signs = bits;
  masked.sampling = {1, 1, 1, 1, 1, 1};
  gradient = masked;
  gradient.reading = kGradient;
  gradient.y = y2.data();
  gradient.vectors = vectors.data();
  gradient.coefficients = c.data();
  gradient.training = true;
  Operand centred = activation;
  centred.mean = mean.data();
  Operand rows = masked;
  rows.reading = kRows;
  rows.signs = nullptr;

  table.pack[dtype]({inner, outer, weight.data(), true, false, across.data()}, 0, (outer + kPanel - 1) / kPanel);
  table.pack[dtype]({outer, inner, weight.data(), false, true, back.data()}, 0, (inner + kPanel - 1) / kPanel);
  const Tiling tall{pixels, outer, block, block, blocks, stretches};
  const Tiling flat{pixels, inner, block, block, blocks, (inner + kStretch - 1) / kStretch};
  {
    Buffer scratch(2 * memory(kStretch) + 2 * memory(inner), wide);
    for (int shortcut = 0; shortcut < 4; ++shortcut) {
      PointwiseTail tail{};
      tail.tiling = tall;
      tail.main = {activation, across.data()};
      if (shortcut == 3) tail.projection = tail.main;
      tail.vectors = vectors.data();
      tail.skip = shortcut == 1 ? y.data() : nullptr;
      tail.y2 = shortcut == 2 ? y.data() : nullptr;
      tail.vectors2 = shortcut > 1 ? vectors.data() : nullptr;
      tail.out = out.data();
      tail.signs = shortcut == 0 ? nullptr : bits;
      table.pointwise_tail[dtype](tail, 0, blocks * stretches, scratch.data());
    }
  }
  {
    Buffer scratch(memory(kStretch) + memory(inner), wide);
    Product fprop{};
    fprop.tiling = tall;
    fprop.first = {activation, across.data()};
    fprop.out = out.data();
    fprop.statistics = {tall, out.data(), partials.data()};
    table.product[dtype](fprop, 0, blocks * stretches, scratch.data());
  }
  {
    Buffer scratch(memory(kStretch) + memory(outer) + memory(inner), wide);
    for (const Operand* left : {&masked, &gradient, &rows}) {
      Product dgrad{};
      dgrad.tiling = flat;
      dgrad.first = {*left, back.data()};
      dgrad.second = {centred, squares.data()};
      dgrad.start = left == &masked ? start.data() : nullptr;
      dgrad.constant = left == &masked ? mean.data() : nullptr;
      dgrad.addend = left == &rows ? whole.data() : nullptr;
      dgrad.addend_signs = left == &rows ? static_cast<uint8_t*>(inner_signs.data()) : nullptr;
      dgrad.addend_sampling = {(pixels + 1) / 2, (pixels + 1) / 2, 1, 2, pixels, pixels};
      dgrad.out = dz.data();
      dgrad.sums = {flat, dz.data(), whole.data(), z_vectors.data(), nullptr, nullptr, nullptr, inner_partials.data()};
      table.product[dtype](dgrad, 0, blocks * flat.stretches, scratch.data());
    }
  }
  for (const bool cut : {false, true}) {
    const int64_t stretch = cut ? kPanel : outer;
    Buffer scratch(memory(stretch) + 2 * memory(inner), wide);
    Reduction reduction{};
    reduction.tiling = {pixels, outer, block, block, blocks, (outer + stretch - 1) / stretch};
    reduction.stretch = stretch;
    reduction.left = masked;
    reduction.right = centred;
    reduction.products = products.data();
    reduction.sums = sums.data();
    reduction.packed = cut ? nullptr : back.data();
    reduction.through = cut ? nullptr : through.data();
    table.reduction[dtype](reduction, 0, blocks * reduction.tiling.stretches, scratch.data());
  }
  {
    Buffer scratch(memory(inner), wide);
    const Tiling tiling{pixels, inner, block, block * blocks, 1, 1};
    table.moments[dtype](
        {tiling, activation, squares.data(), static_cast<double*>(centres.data()), static_cast<double*>(rests.data())},
        0, 1, scratch.data());
  }
  for (const bool centred : {false, true}) {
    const auto row = [](int64_t channels) { return whole_panels(channels) + 8; };
    const auto doubles = [](Buffer& buffer) { return static_cast<double*>(buffer.data()); };
    const int64_t tasks = (outer + block - 1) / block;
    Buffer scratch((2 * block + 1) * row(inner), 8), covariance(inner * inner, 8),
        panels(inner * whole_panels(inner), 8);
    Buffer means(inner, 8), deviations(inner, 8), found(outer, 8), vars(outer, 8), suspect(outer, 1);
    Buffer totals(outer, 8), parts(outer * inner, 8), direct(outer, 8), d(outer, 8), constants(tasks * inner, 8);
    Buffer scaled(outer * inner, item), dweight(outer * inner, item), shares(outer * inner, wide),
        wider(outer * inner, wide);
    table.pack[kDouble]({inner, inner, covariance.data(), false, false, panels.data()}, 0,
                        (inner + kPanel - 1) / kPanel);
    Spread spread{outer,
                  inner,
                  block,
                  weight.data(),
                  doubles(means),
                  doubles(deviations),
                  panels.data(),
                  0.5,
                  doubles(found),
                  doubles(vars),
                  static_cast<uint8_t*>(suspect.data())};
    if (centred) table.spread[dtype](spread, 0, tasks, scratch.data());
    spread.mean = nullptr;
    spread.vars = nullptr;
    if (!centred) spread.packed = nullptr;
    const TailGradients gradients{spread,
                                  2,
                                  doubles(totals),
                                  doubles(parts),
                                  centred ? doubles(direct) : nullptr,
                                  vectors.data(),
                                  scaled.data(),
                                  dweight.data(),
                                  doubles(d),
                                  centred ? doubles(constants) : nullptr,
                                  shares.data(),
                                  item == wide ? nullptr : wider.data()};
    table.tail_gradients[dtype](gradients, 0, tasks, scratch.data());
  }
  table.masked_add[dtype]({inner, whole.data(), nullptr, activation.sampling, z.data()}, 0, pixels);
}

// 3x3 convolutions of two images, `around` zeros about them, with blocks of so many lines of tiles.
void winograd(Dtype dtype, int64_t height, int64_t width, int64_t around, int64_t in, int64_t out, int64_t block) {
  const auto& table = FUSED_RES_VARIANT::table;
  const int64_t item = dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2, wide = dtype == kDouble ? 8 : 4;
  const int64_t out_height = height + 2 * around - 2, out_width = width + 2 * around - 2;
  const TileGrid grid{
      2, height, width, around, around, out_height, out_width, (out_height + 1) / 2, (out_width + 1) / 2, block};
  const int64_t tiles = kPoints * (block * grid.across + 1), lines = 6 * (2 * grid.across + 2);
  const auto memory = [&](int64_t rows, int64_t channels) { return rows * (whole_panels(channels) + 64 / wide); };
  const int64_t pixels = 2 * out_height * out_width, read = 2 * height * width,
                blocks = (2 * grid.lines + block - 1) / block;
  const int64_t stretches = (out + kStretch - 1) / kStretch;
  Buffer x(read * in, item), x_vectors(5 * in, wide), weight(out * 9 * in, item), dweight(out * 9 * in, item);
  Buffer y(pixels * out, item), y2(pixels * out, item), vectors(5 * out, wide), c(7 * out, wide);
  Buffer signs(pixels * ((out + 7) / 8), 1), partials(blocks * 2 * out, wide);
  Buffer filter(kPoints * filter_elements(in, out), wide), backwards(kPoints * filter_elements(out, in), wide);
  uint8_t* bits = static_cast<uint8_t*>(signs.data());

  const auto tasks = [](int64_t depth, int64_t columns) {
    return (depth + kPanel - 1) / kPanel * ((columns + kPanel - 1) / kPanel);
  };
  table.winograd_filter[dtype]({out, in, weight.data(), false, filter.data()}, 0, tasks(in, out));
  table.winograd_filter[dtype]({out, in, weight.data(), true, backwards.data()}, 0, tasks(out, in));
  Operand activation{};
  activation.reading = kActivation;
  activation.channels = in;
  activation.rows = x.data();
  activation.vectors = x_vectors.data();
  activation.sampling = {1, 1, 1, 1, 1, 1};
  for (int epilogue = 0; epilogue < 6; ++epilogue) {
    Buffer result(pixels * out, item),
        scratch(memory(tiles, in) + memory(tiles, std::min(out, kStretch)) + memory(lines, in), wide);
    Winograd a{};
    const int64_t rows = 2 * block * out_width;
    a.tiling = {pixels, out, rows, rows, blocks, stretches};
    a.grid = grid;
    a.operand = activation;
    a.filter = filter.data();
    a.out = result.data();
    if (epilogue == 1)
      a.joins = {out,
                 y.data(),
                 bits,
                 {out_width, out_height * out_width, 1, 1, out_width, out_height * out_width},
                 result.data()};
    if (epilogue == 2 && out_height % 2 == 0) a.statistics = {a.tiling, result.data(), partials.data()};
    if (epilogue == 3 && out_height % 2 == 0) {
      a.sums = {a.tiling, result.data(), y.data(), vectors.data(), nullptr, nullptr, nullptr, partials.data()};
    }
    if (epilogue > 3) {
      a.finish = {out,
                  result.data(),
                  vectors.data(),
                  epilogue == 4 ? y.data() : nullptr,
                  epilogue == 5 ? y2.data() : nullptr,
                  epilogue == 5 ? vectors.data() : nullptr,
                  result.data(),
                  nullptr,
                  false};
    }
    table.winograd[dtype](a, 0, blocks * stretches, scratch.data());
  }
  WinogradWgrad gradient{};
  gradient.grid = grid;
  gradient.blocks = 2;
  gradient.tiles = (blocks + 1) / 2;
  gradient.stretch = kPanel;
  gradient.lefts = (out + kPanel - 1) / kPanel;
  gradient.rights = (in + kPanel - 1) / kPanel;
  gradient.right = activation;
  gradient.left.reading = kGradient;
  gradient.left.channels = out;
  gradient.left.rows = y.data();
  gradient.left.y = y2.data();
  gradient.left.vectors = vectors.data();
  gradient.left.coefficients = c.data();
  gradient.left.signs = bits;
  gradient.left.training = true;
  gradient.left.sampling = {1, 1, 1, 1, 1, 1};
  gradient.dweight = dweight.data();
  const int64_t all = gradient.tiles * gradient.lefts * gradient.rights;
  Buffer products(all * kPoints * kPanel * kPanel, wide),
      scratch(2 * memory(tiles, kPanel) + memory(lines, kPanel), wide);
  gradient.products = products.data();
  table.winograd_wgrad[dtype](gradient, 0, all, scratch.data());
  table.winograd_dweight[dtype](gradient, 0, out);
}

}  // namespace

// With an argument products of all sizes, and otherwise of all pairs of two of them.
int main(int count, char**) {
  const bool all = count > 1;
  const int64_t inners[] = {1, 7, 8, 64, 65, 300}, outers[] = {1, 9, 64, 100, 257}, rows[] = {1, 5, 6, 7, 25};
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    for (int64_t channels : {1, 3, 7, 8, 9, 16, 20, 31, 64, 100, 256, 257, 300, 512}) {
      for (int64_t pixels : {1, 2, 3, 7, 8, 9, 17, 65}) {
        run(static_cast<Dtype>(dtype), pixels, channels, 8, 2);
        run(static_cast<Dtype>(dtype), pixels, channels, 1000, 1);
      }
      pool(static_cast<Dtype>(dtype), channels, {3, 2, 1, 1, 8, 5}, {2, 3, 0, 2, 7, 3});
      pool(static_cast<Dtype>(dtype), channels, {3, 2, 0, 1, 2, 1}, {5, 1, 2, 1, 1, 1});
    }
    for (size_t i = 0; i < std::size(inners); ++i) {
      for (size_t o = 0; o < std::size(outers); ++o) {
        for (size_t r = 0; r < std::size(rows); ++r) {
          if (!all && (i + o + r) % std::size(rows) > 1) continue;
          multiply(static_cast<Dtype>(dtype), rows[r], inners[i], outers[o], 12);
        }
      }
    }
    if (dtype == kHalf || dtype == kBFloat16) continue;  // there is no 3x3 convolution in 16 bits
    const int64_t filters[][2] = {{7, 9}, {64, 70}, {257, 9}, {9, 257}};
    for (const auto& [in, out] : filters) {
      winograd(static_cast<Dtype>(dtype), 7, 4, 1, in, out, 2);
      winograd(static_cast<Dtype>(dtype), 4, 9, 0, in, out, 3);
      winograd(static_cast<Dtype>(dtype), 1, 2, 2, in, out, 1);
    }
  }
  std::puts(FUSED_RES_VARIANT::table.name);
}
