// Kernel of `bn_act`: normalise, add the shortcut, apply ReLU, if asked for, and keep its signs, in one pass.
#pragma once

#include "launch.cuh"
#include "signs.cuh"

namespace fused_res::cuda {

enum class Shortcut { kNone, kIdentity, kProjection };

struct BnAct {
  const void* y;          // [P, C]
  const float* vectors;   // [5, C]
  const void* skip;       // [P, C]: the identity shortcut, or the projection's convolution output
  const float* vectors2;  // [5, C] of the projection
  void* out;              // [P, C]
  std::uint8_t* signs;    // [P, ceil(C / 8)] or null
  Layout layout;
  bool relu = true;
};

/// Rows that a thread loads before it computes: four independent loads of 16 bytes, or about as many single ones.
template <bool kWide, Shortcut kShortcut>
constexpr int kActRows = !kWide                         ? 1
                         : kShortcut == Shortcut::kNone ? 4
                                                        : 2;

template <class T, bool kWide, Shortcut kShortcut>
__global__ void __launch_bounds__(kThreads) bn_act_kernel(BnAct a) {
  constexpr int kCount = kGroup<T>, kRows = kActRows<kWide, kShortcut>;
  const Place at = locate<T>(a.layout);
  const std::int64_t P = a.layout.rows, C = a.layout.channels;
  const int down = a.layout.down;
  const T* y = static_cast<const T*>(a.y) + at.channel;
  const T* skip = static_cast<const T*>(a.skip) + at.channel;
  T* out = static_cast<T*>(a.out) + at.channel;

  const Affine<kCount> first = load_affine<kWide, kCount>(a.vectors, C, at);
  Affine<kCount> second{};
  if constexpr (kShortcut == Shortcut::kProjection) second = load_affine<kWide, kCount>(a.vectors2, C, at);

  // All threads of a block take the same steps: lanes exchange signs.
  const std::int64_t step = std::int64_t{kRows} * down;
  for (std::int64_t start = at.block * step; start < P; start += at.blocks * step) {
    Pack value[kRows], other[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const std::int64_t row = start + u * down + at.row;
      const int valid = row < P ? at.valid : 0;
      value[u] = load<T, kWide>(y + row * C, valid);
      if constexpr (kShortcut != Shortcut::kNone) other[u] = load<T, kWide>(skip + row * C, valid);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const std::int64_t row = start + u * down + at.row;
      const int valid = row < P ? at.valid : 0;
      float result[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        float v = first(j, get<T>(value[u], j));
        if constexpr (kShortcut == Shortcut::kIdentity) v += get<T>(other[u], j);
        if constexpr (kShortcut == Shortcut::kProjection) v += second(j, get<T>(other[u], j));
        result[j] = a.relu ? relu(v) : v;
      }
      const Pack rounded = pack<T>(result);
      store<T, kWide>(out + row * C, rounded, valid);
      if (a.signs != nullptr) {
        unsigned open = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) open |= static_cast<unsigned>(is_open(get<T>(rounded, j))) << j;
        store_signs<kCount>(a.signs, open, row, at.channel, valid, a.layout.channels);
      }
    }
  }
}

inline void bn_act(const BnAct& a, Number number, Shortcut shortcut, const Queue& queue) {
  const bool wide = moves_wide(a.layout.channels, group_of(number), {a.y, a.vectors, a.skip, a.vectors2, a.out});
  dispatch(number, wide, [&](auto type, auto wide) {
    using T = typename decltype(type)::type;
    const auto with = [&](auto shortcut) {
      constexpr bool kWide = decltype(wide)::value;
      constexpr Shortcut kShortcut = decltype(shortcut)::value;
      const int rows = kActRows<kWide, kShortcut> * a.layout.down;
      const unsigned blocks = persistent_blocks(a.layout, rows, queue.multiprocessors);
      launch(bn_act_kernel<T, kWide, kShortcut>, blocks, queue, a);
    };
    if (shortcut == Shortcut::kNone) with(std::integral_constant<Shortcut, Shortcut::kNone>{});
    if (shortcut == Shortcut::kIdentity) with(std::integral_constant<Shortcut, Shortcut::kIdentity>{});
    if (shortcut == Shortcut::kProjection) with(std::integral_constant<Shortcut, Shortcut::kProjection>{});
  });
}

}  // namespace fused_res::cuda
