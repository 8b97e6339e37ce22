// Kernels of `bn_act_backward`: through the ReLU and one or two BNs, in three steps: reduce, finalize, apply.
#pragma once

#include "launch.cuh"
#include "merge.cuh"
#include "parameter.cuh"
#include "signs.cuh"

namespace fused_res::cuda {

/// Where the ReLU's signs come from and how many BNs it followed: kInner recomputes them from scale * y + shift.
enum class Relu { kInner, kOuter, kOuterTwo };

template <class Run>
void dispatch(Relu relu, Run run) {
  if (relu == Relu::kInner) run(std::integral_constant<Relu, Relu::kInner>{});
  if (relu == Relu::kOuter) run(std::integral_constant<Relu, Relu::kOuter>{});
  if (relu == Relu::kOuterTwo) run(std::integral_constant<Relu, Relu::kOuterTwo>{});
}

/// The open channels of a group in a row, one bit each.
template <class T, Relu kRelu>
__device__ __forceinline__ unsigned opened(const Affine<kGroup<T>>& affine, const Pack& y, unsigned signs) {
  if constexpr (kRelu != Relu::kInner) return signs;
  unsigned open = 0;
#pragma unroll
  for (int j = 0; j < kGroup<T>; ++j) open |= static_cast<unsigned>(is_open(affine(j, get<T>(y, j)))) << j;
  return open;
}

struct BnActBackwardReduce {
  const void* dout;           // [P, C]
  const void* y;              // [P, C]
  const float* vectors;       // [5, C]
  const std::uint8_t* signs;  // [P, ceil(C / 8)], null for kInner
  const void* y2;             // [P, C] for kOuterTwo
  const float* vectors2;      // [5, C] likewise
  float* partials;            // [T, 2 or 3, C]
  std::int64_t rows;          // of a tile
  Layout layout;
};

template <class T, bool kWide, Relu kRelu>
__global__ void __launch_bounds__(kThreads) bn_act_backward_reduce_kernel(BnActBackwardReduce a) {
  constexpr bool kTwo = kRelu == Relu::kOuterTwo;
  constexpr int kCount = kGroup<T>, kRows = kWide ? 2 : 1, kSums = kTwo ? 3 : 2;
  const Place at = locate<T>(a.layout);
  const int down = a.layout.down, channels = a.layout.channels;
  const std::int64_t C = channels, first = at.block * a.rows;
  const std::int64_t end = first + a.rows < a.layout.rows ? first + a.rows : a.layout.rows;
  const T* dout = static_cast<const T*>(a.dout) + at.channel;
  const T* y = static_cast<const T*>(a.y) + at.channel;
  const T* y2 = static_cast<const T*>(a.y2) + at.channel;

  Affine<kCount> affine{};
  if constexpr (kRelu == Relu::kInner) affine = load_affine<kWide, kCount>(a.vectors, C, at);
  float mean[kCount], mean2[kCount] = {};
  load_vector<kWide>(mean, a.vectors + kMean * C + at.channel, at.valid);
  if constexpr (kTwo) load_vector<kWide>(mean2, a.vectors2 + kMean * C + at.channel, at.valid);

  float sums[kSums][kCount] = {};
  for (std::int64_t row = at.valid ? first + at.row : end; row < end; row += kRows * down) {
    Pack g[kRows], value[kRows], value2[kRows];
    unsigned signs[kRows] = {};
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const std::int64_t r = row + u * down;
      const int valid = r < end ? at.valid : 0;
      g[u] = load<T, kWide>(dout + r * C, valid);
      value[u] = load<T, kWide>(y + r * C, valid);
      if constexpr (kRelu != Relu::kInner) signs[u] = load_signs<kCount>(a.signs, r, at.channel, valid, channels);
      if constexpr (kTwo) value2[u] = load<T, kWide>(y2 + r * C, valid);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (row + u * down < end) {
        const unsigned open = opened<T, kRelu>(affine, value[u], signs[u]);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float passed = open >> j & 1u ? get<T>(g[u], j) : 0.f;
          sums[0][j] += passed;
          sums[1][j] += passed * (get<T>(value[u], j) - mean[j]);
          if constexpr (kTwo) sums[2][j] += passed * (get<T>(value2[u], j) - mean2[j]);
        }
      }
    }
  }

  merge_sums(sums, at.row, down, a.layout.across);
  if (at.row == 0) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      store_vector<kWide>(a.partials + (std::int64_t{at.block} * kSums + s) * C + at.channel, sums[s], at.valid);
    }
  }
}

inline void bn_act_backward_reduce(const BnActBackwardReduce& a, Number number, Relu relu, std::int64_t tiles,
                                   const Queue& queue) {
  const bool wide =
      moves_wide(a.layout.channels, group_of(number), {a.dout, a.y, a.vectors, a.y2, a.vectors2, a.partials});
  const unsigned blocks = static_cast<unsigned>(tiles * a.layout.chunks);
  dispatch(number, wide, [&](auto type, auto wide) {
    dispatch(relu, [&](auto relu) {
      using T = typename decltype(type)::type;
      launch(bn_act_backward_reduce_kernel<T, decltype(wide)::value, decltype(relu)::value>, blocks, queue, a);
    });
  });
}

struct BnActBackwardFinalize {
  const float* partials;  // [T, sums, C]
  const float* vectors;   // [5, C]
  Parameter gamma, beta, residual_scale;
  float* coefficients;  // [7, C]
  std::int64_t tiles;
  std::int64_t pixels;
  int sums;
  int row;  // of this BN's g * (y - mean)
  int channels;
  bool training;
};

static __global__ void __launch_bounds__(kThreads) bn_act_backward_finalize_kernel(BnActBackwardFinalize a) {
  const int slot = static_cast<int>(threadIdx.x) / kFinalizeChannels;
  const std::int64_t C = a.channels;
  const std::int64_t c = std::int64_t{blockIdx.x} * kFinalizeChannels + threadIdx.x % kFinalizeChannels;
  const bool inside = c < C;
  float sums[2][1] = {};
#pragma unroll 4
  for (std::int64_t t = inside ? slot : a.tiles; t < a.tiles; t += kFinalizeSlots) {
    const float* from = a.partials + t * a.sums * C + c;
    sums[0][0] += __ldg(from);
    sums[1][0] += __ldg(from + a.row * C);
  }
  merge_sums(sums, slot, kFinalizeSlots, kFinalizeChannels);
  if (slot > 0 || !inside) return;

  const float total = sums[0][0], invstd = a.vectors[kInvstd * C + c], d = invstd * sums[1][0];
  const float p = a.vectors[kScale * C + c], pixels = static_cast<float>(a.pixels);
  float q = 0.f, r = 0.f, dbias = 0.f;
  if (a.training) {
    q = -p * (invstd * d / pixels);
    r = -p * (total / pixels) - q * a.vectors[kMean * C + c];
  } else {
    dbias = p * total;
  }
  float dscale = a.gamma.data != nullptr ? d * a.gamma.at(c) : d;
  if (a.beta.data != nullptr) dscale += total * a.beta.at(c);
  const float factor = a.residual_scale.data != nullptr ? a.residual_scale.at(0) : 1.f;
  a.coefficients[kP * C + c] = p;
  a.coefficients[kQ * C + c] = q;
  a.coefficients[kR * C + c] = r;
  a.coefficients[kDgamma * C + c] = factor * d;
  a.coefficients[kDbeta * C + c] = factor * total;
  a.coefficients[kDscale * C + c] = dscale;
  a.coefficients[kDbias * C + c] = dbias;
}

inline void bn_act_backward_finalize(const BnActBackwardFinalize& a, const Queue& queue) {
  launch(bn_act_backward_finalize_kernel, finalize_blocks(a.channels), queue, a);
}

/// One BN's way back.
struct BackwardBn {
  const void* y;              // [P, C]; read only where needed
  const float* coefficients;  // [7, C]
  void* dy;                   // [P, C]
  bool training;              // where not, q = r = 0 and NaN and Inf in y stay out of dy
};

struct BnActBackwardApply {
  const void* dout;           // [P, C]
  const float* vectors;       // [5, C] of the first BN
  const std::uint8_t* signs;  // [P, ceil(C / 8)], null for kInner
  BackwardBn bn, bn2;         // the second for kOuterTwo
  void* masked;               // [P, C] or null
  Layout layout;
};

template <int kCount>
struct Gradient {
  float p[kCount], q[kCount], r[kCount];

  template <bool kWide>
  __device__ __forceinline__ void load(const BackwardBn& bn, std::int64_t C, const Place& at) {
    load_vector<kWide>(p, bn.coefficients + kP * C + at.channel, at.valid);
    load_vector<kWide>(q, bn.coefficients + kQ * C + at.channel, at.valid);
    load_vector<kWide>(r, bn.coefficients + kR * C + at.channel, at.valid);
  }

  template <class T>
  __device__ __forceinline__ Pack apply(const float (&g)[kCount], const Pack& y, bool training) const {
    float dy[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      dy[j] = g[j] * p[j];
      if (training) dy[j] += fmaf(get<T>(y, j), q[j], r[j]);
    }
    return pack<T>(dy);
  }
};

template <bool kWide>
constexpr int kApplyRows = kWide ? 2 : 1;

template <class T, bool kWide, Relu kRelu>
__global__ void __launch_bounds__(kThreads, kWide ? 2 : 1) bn_act_backward_apply_kernel(BnActBackwardApply a) {
  constexpr bool kTwo = kRelu == Relu::kOuterTwo;
  constexpr int kCount = kGroup<T>, kRows = kApplyRows<kWide>;
  const Place at = locate<T>(a.layout);
  const std::int64_t P = a.layout.rows, C = a.layout.channels;
  const int down = a.layout.down, channels = a.layout.channels;
  const T* dout = static_cast<const T*>(a.dout) + at.channel;
  const T* y = static_cast<const T*>(a.bn.y) + at.channel;
  const T* y2 = static_cast<const T*>(a.bn2.y) + at.channel;
  T* dy = static_cast<T*>(a.bn.dy) + at.channel;
  T* dy2 = static_cast<T*>(a.bn2.dy) + at.channel;
  T* masked = static_cast<T*>(a.masked) + at.channel;

  Affine<kCount> affine{};
  if constexpr (kRelu == Relu::kInner) affine = load_affine<kWide, kCount>(a.vectors, C, at);
  Gradient<kCount> gradient, gradient2;
  gradient.template load<kWide>(a.bn, C, at);
  if constexpr (kTwo) gradient2.template load<kWide>(a.bn2, C, at);

  const bool reads = kRelu == Relu::kInner || a.bn.training, reads2 = kTwo && a.bn2.training;
  const std::int64_t step = std::int64_t{kRows} * down;
  for (std::int64_t start = at.block * step; start < P; start += at.blocks * step) {
    Pack g[kRows], value[kRows], value2[kRows];
    unsigned signs[kRows] = {};
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const std::int64_t row = start + u * down + at.row;
      const int valid = row < P ? at.valid : 0;
      g[u] = load<T, kWide>(dout + row * C, valid);
      value[u] = load<T, kWide>(y + row * C, reads ? valid : 0);
      if constexpr (kRelu != Relu::kInner) signs[u] = load_signs<kCount>(a.signs, row, at.channel, valid, channels);
      if constexpr (kTwo) value2[u] = load<T, kWide>(y2 + row * C, reads2 ? valid : 0);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const std::int64_t row = start + u * down + at.row;
      const int valid = row < P ? at.valid : 0;
      const unsigned open = opened<T, kRelu>(affine, value[u], signs[u]);
      float passed[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) passed[j] = open >> j & 1u ? get<T>(g[u], j) : 0.f;
      if (a.masked != nullptr) store<T, kWide>(masked + row * C, pack<T>(passed), valid);
      store<T, kWide>(dy + row * C, gradient.template apply<T>(passed, value[u], a.bn.training), valid);
      if constexpr (kTwo) {
        store<T, kWide>(dy2 + row * C, gradient2.template apply<T>(passed, value2[u], a.bn2.training), valid);
      }
    }
  }
}

inline void bn_act_backward_apply(const BnActBackwardApply& a, Number number, Relu relu, const Queue& queue) {
  const bool wide = moves_wide(
      a.layout.channels, group_of(number),
      {a.dout, a.vectors, a.bn.y, a.bn.coefficients, a.bn.dy, a.bn2.y, a.bn2.coefficients, a.bn2.dy, a.masked});
  dispatch(number, wide, [&](auto type, auto wide) {
    constexpr bool kWide = decltype(wide)::value;
    const int rows = kApplyRows<kWide> * a.layout.down;
    const unsigned blocks = persistent_blocks(a.layout, rows, queue.multiprocessors);
    dispatch(relu, [&](auto relu) {
      using T = typename decltype(type)::type;
      launch(bn_act_backward_apply_kernel<T, kWide, decltype(relu)::value>, blocks, queue, a);
    });
  });
}

}  // namespace fused_res::cuda
