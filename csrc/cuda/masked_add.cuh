// Kernel of `masked_add`: one more gradient of x joins dx in place, where the outer ReLU was open, at the pixels of a
// stride.
#pragma once

#include "launch.cuh"
#include "sampling.cuh"
#include "signs.cuh"

namespace fused_res::cuda {

struct MaskedAdd {
  const void* addend;         // [P, C]
  const std::uint8_t* signs;  // [P, ceil(C / 8)] or null: open everywhere
  void* dx;                   // [rows, C], of which the P sampled ones are written
  Sampling sampling;
  Layout layout;  // of the addend
};

/// Rows that a thread loads before it computes, two groups of each.
template <bool kWide>
constexpr int kAddRows = kWide ? 2 : 1;

template <class T, bool kWide, Sample kSample>
__global__ void __launch_bounds__(kThreads) masked_add_kernel(MaskedAdd a) {
  constexpr int kCount = kGroup<T>, kRows = kAddRows<kWide>;
  const Place at = locate<T>(a.layout);
  const std::int64_t P = a.layout.rows, C = a.layout.channels;
  const int down = a.layout.down;
  const T* addend = static_cast<const T*>(a.addend) + at.channel;
  T* dx = static_cast<T*>(a.dx) + at.channel;

  const std::int64_t step = std::int64_t{kRows} * down;
  for (std::int64_t start = at.block * step; start < P; start += at.blocks * step) {
    Pack value[kRows], more[kRows];
    unsigned open[kRows];
    T* place[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const std::int64_t row = start + u * down + at.row;
      const int valid = row < P ? at.valid : 0;
      place[u] = dx + (valid > 0 ? source_row<kSample>(a.sampling, row) * C : 0);
      value[u] = load<T, kWide, Memory::kWritten>(place[u], valid);
      more[u] = load<T, kWide>(addend + row * C, valid);
      open[u] = a.signs == nullptr ? ~0u : load_signs<kCount>(a.signs, row, at.channel, valid, a.layout.channels);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      float total[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        total[j] = get<T>(value[u], j) + (open[u] >> j & 1u ? get<T>(more[u], j) : 0.f);
      }
      store<T, kWide>(place[u], pack<T>(total), start + u * down + at.row < P ? at.valid : 0);
    }
  }
}

inline void masked_add(const MaskedAdd& a, Number number, const Queue& queue) {
  const bool wide = moves_wide(a.layout.channels, group_of(number), {a.addend, a.dx});
  dispatch(number, wide, [&](auto type, auto wide) {
    using T = typename decltype(type)::type;
    constexpr bool kWide = decltype(wide)::value;
    const unsigned blocks = persistent_blocks(a.layout, kAddRows<kWide> * a.layout.down, queue.multiprocessors);
    if (a.sampling.down == 1 && a.sampling.right == 1) {
      launch(masked_add_kernel<T, kWide, Sample::kAll>, blocks, queue, a);
    } else {
      launch(masked_add_kernel<T, kWide, Sample::kSome>, blocks, queue, a);
    }
  });
}

}  // namespace fused_res::cuda
