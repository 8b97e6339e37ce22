// What the gradients of a 1x1 convolution and its BN in the moment form have for every row of the weight.
#pragma once

#include "spread_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// to = scale * (product [- share * weighted]), rounded; `row` holds it before.
template <class T>
inline void weight_gradient(int64_t depth, double scale, const double* product, double share, const double* weighted,
                            double* row, T* to) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const Double s = Double::set(scale), r = Double::set(-share);
  for_channels<Double::width>(depth, [&](int64_t k, auto lanes) {
    Double value = load<Double>(product + k, lanes);
    if (weighted != nullptr) value = fma(r, load<Double>(weighted + k, lanes), value);
    store(row + k, s * value, lanes);
  });
  for_channels<V::width>(depth, [&](int64_t k, auto lanes) {
    const int64_t count = min(V::width, depth - k);
    A lane[V::width] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = static_cast<A>(row[k + i]);
    store(to + k, V::load(lane), lanes);
  });
}

// What B and b take of a row a of A: share * a, the row of the weight as wide as that, and total * a.
template <class T>
inline void quadratic_parts(const TailGradients& t, int64_t c, double share, double total, double* a,
                            double* constant) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const int64_t depth = t.spread.depth;
  const T* row = static_cast<const T*>(t.scaled) + c * depth;
  const T* weight = static_cast<const T*>(t.spread.weight) + c * depth;
  A* shares = static_cast<A*>(t.shares) + c * depth;
  A* wide = t.wide == nullptr ? nullptr : static_cast<A*>(t.wide) + c * depth;
  const V factor = V::set(static_cast<A>(share));
  for_channels<V::width>(depth, [&](int64_t k, auto lanes) {
    store(shares + k, factor * load<V>(row + k, lanes), lanes);
    if (wide != nullptr) store(wide + k, load<V>(weight + k, lanes), lanes);
  });
  widen(row, depth, a);
  const Double sum = Double::set(total);
  for_channels<Double::width>(depth, [&](int64_t k, auto lanes) {
    store(constant + k, fma(sum, load<Double>(a + k, lanes), load<Double>(constant + k, lanes)), lanes);
  });
}

template <class T>
void tail_gradients(const TailGradients& t, int64_t begin, int64_t end, void* memory) {
  using A = typename Arithmetic<T>::type;
  const Spread& s = t.spread;
  const int64_t channels = s.channels, depth = s.depth;
  const A *means = static_cast<const A*>(t.vectors), *invstds = means + kInvstd * channels,
          *scales = means + kScale * channels;
  Scratch scratch(memory);
  SpreadBlock block(s, scratch);
  double* row = scratch.take<double>(1, depth);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * s.block, n = min(s.block, channels - first);
    double* constant = t.constants == nullptr ? nullptr : t.constants + task * depth;
    if (constant != nullptr) std::memset(constant, 0, depth * sizeof(double));
    block.run<T>(first, n);
    for (int64_t p = 0; p < n; ++p) {
      const int64_t c = first + p;
      const bool centred = s.packed != nullptr;
      const double* product = t.products + c * depth;
      const double invstd = static_cast<double>(invstds[c]), total = t.totals[c];
      double d = dot(block.weight(p), product, depth);
      if (!centred) d -= total * static_cast<double>(means[c]);
      if (t.direct != nullptr && s.suspect[c]) d = t.direct[c];
      d *= invstd;
      t.d[c] = d;
      weight_gradient(depth, static_cast<double>(scales[c]), product, d * invstd, centred ? block.weighted(p) : nullptr,
                      row, static_cast<T*>(t.dweight) + c * depth);
      if (constant != nullptr) quadratic_parts<T>(t, c, invstd * d / t.pixels, total / t.pixels, row, constant);
    }
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
