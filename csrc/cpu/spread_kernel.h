// The quadratic forms w'Gw of the rows of a weight, with G a covariance: in double, whatever the weight is.
#pragma once

#include "operand_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

using Double = Arithmetic<double>::Vec;

// A row in double. A vector of T past its end may be written, too.
template <class T>
inline void widen(const T* from, int64_t n, double* to) {
  using V = typename Arithmetic<T>::Vec;
  for_channels<V::width>(n, [&](int64_t k, auto lanes) {
    typename Arithmetic<T>::type lane[V::width];
    load<V>(from + k, lanes).store(lane);
    for (int i = 0; i < V::width; ++i) to[k + i] = static_cast<double>(lane[i]);
  });
}

// The sum of f(k, lanes), vectors, over a row: lane by lane, then over the lanes.
template <class F>
inline double sum_row(int64_t n, F f) {
  Double sum = Double::set(0);
  for_channels<Double::width>(n, [&](int64_t k, auto lanes) { sum = sum + f(k, lanes); });
  double lane[Double::width], total = 0;
  sum.store(lane);
  for (const double part : lane) total += part;
  return total;
}

inline double dot(const double* a, const double* b, int64_t n) {
  return sum_row(n, [&](int64_t k, auto lanes) { return load<Double>(a + k, lanes) * load<Double>(b + k, lanes); });
}

inline Double magnitude(Double a) { return {a.v < 0 ? -a.v : a.v}; }

// A block of rows of the weight, in double, and what they are times G.
class SpreadBlock {
 public:
  SpreadBlock(const Spread& spread, Scratch& scratch)
      : spread_(spread),
        distance_(scratch_row<double>(spread.depth)),
        weight_(scratch.take<double>(spread.block, spread.depth)),
        weighted_(scratch.take<double>(spread.block, spread.depth)) {}

  template <class T>
  void run(int64_t first, int64_t n) {
    const Spread& s = spread_;
    const int64_t depth = s.depth;
    for (int64_t p = 0; p < n; ++p) widen(static_cast<const T*>(s.weight) + (first + p) * depth, depth, weight(p));
    if (s.packed == nullptr) return;
    Ahead nothing;
    multiply<Double>(n, depth, whole_panels<Double>(depth), weight_, distance_, static_cast<const double*>(s.packed),
                     weighted_, distance_, false, nothing);
    for (int64_t p = 0; p < n; ++p) {
      const double *w = weight(p), var = dot(weighted(p), w, depth);
      const double most = sum_row(depth, [&](int64_t k, auto lanes) {
        return magnitude(load<Double>(w + k, lanes)) * load<Double>(s.deviations + k, lanes);
      });
      s.suspect[first + p] = var < s.ratio * (most * most);
      if (s.mean != nullptr) s.means[first + p] = dot(s.mean, w, depth);
      if (s.vars != nullptr) s.vars[first + p] = var < 0 ? 0 : var;
    }
  }

  double* weight(int64_t p) const { return weight_ + p * distance_; }
  double* weighted(int64_t p) const { return weighted_ + p * distance_; }

 private:
  const Spread& spread_;
  int64_t distance_;
  double *weight_, *weighted_;
};

template <class T>
void spread(const Spread& s, int64_t begin, int64_t end, void* memory) {
  Scratch scratch(memory);
  SpreadBlock block(s, scratch);
  for (int64_t task = begin; task < end; ++task) {
    block.run<T>(task * s.block, min(s.block, s.channels - task * s.block));
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
