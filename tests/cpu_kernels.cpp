// Runs every CPU kernel of one instruction set on buffers of exactly the right size, for a build with sanitizers: a
// read or write past an end, or an operation without a meaning, ends the process.
#include <cstdio>
#include <cstdlib>
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

}  // namespace

int main() {
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    for (int64_t channels : {1, 3, 7, 8, 9, 16, 20, 31, 64, 100, 256, 257, 300, 512}) {
      for (int64_t pixels : {1, 2, 3, 7, 8, 9, 17, 65}) {
        run(static_cast<Dtype>(dtype), pixels, channels, 8, 2);
        run(static_cast<Dtype>(dtype), pixels, channels, 1000, 1);
      }
    }
  }
  std::puts(FUSED_RES_VARIANT::table.name);
}
