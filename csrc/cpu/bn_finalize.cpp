// bn_finalize on the CPU, in double: it is a few numbers for each channel; and bn_stats_finalize, both steps in one
// call.
#include "bn_stats.h"
#include "parameters.h"

namespace fused_res::cpu {
namespace {

struct Merge {
  int64_t tiles, rows, pixels, channels;
};

template <class A>
void finalize(const Merge& m, const A* partials, const Affine& affine, const Result& vectors, int64_t from,
              int64_t to) {
  double mean[kChannels] = {}, var[kChannels] = {};
  const auto count = [&](int64_t t) { return static_cast<double>(t + 1 < m.tiles ? m.rows : m.pixels - m.rows * t); };
  const auto tile = [&](int64_t t) { return partials + t * 2 * m.channels; };
  // Means count from the first tile's, which itself then is exactly 0: a single tile passes unchanged, infinite or not.
  for (int64_t t = 1; t < m.tiles; ++t) {
    for (int64_t c = from; c < to; ++c) mean[c - from] += count(t) * (double(tile(t)[c]) - double(tile(0)[c]));
  }
  for (int64_t c = from; c < to; ++c) mean[c - from] /= static_cast<double>(m.pixels);
  for (int64_t t = 0; t < m.tiles; ++t) {
    for (int64_t c = from; c < to; ++c) {
      const double delta = (t == 0 ? 0 : double(tile(t)[c]) - double(tile(0)[c])) - mean[c - from];
      var[c - from] += double(tile(t)[m.channels + c]) + count(t) * delta * delta;
    }
  }
  for (int64_t c = from; c < to; ++c) {
    const double total = mean[c - from] + double(tile(0)[c]);
    affine.set(vectors, m.channels, c, total, var[c - from] / static_cast<double>(m.pixels));
  }
}

Tensor bn_finalize(const Tensor& partials, int64_t rows, int64_t pixels, const OptionalTensor& gamma,
                   const OptionalTensor& beta, double eps, const OptionalTensor& residual_scale) {
  check_bn_finalize(partials, rows, pixels, gamma, beta, residual_scale);
  const Merge merge{partials.size(0), rows, pixels, partials.size(2)};
  const Tensor vectors = new_tensor(partials, {kVectors, merge.channels});
  const Affine affine(gamma, beta, eps, residual_scale);
  const Result result(vectors);
  for_stretches(merge.channels, merge.tiles, [&](int64_t from, int64_t to) {
    if (partials.scalar_type() == ScalarType::Double) {
      finalize(merge, static_cast<const double*>(data(partials)), affine, result, from, to);
    } else {
      finalize(merge, static_cast<const float*>(data(partials)), affine, result, from, to);
    }
  });
  return vectors;
}

}  // namespace

Tensor bn_stats_finalize(const Tensor& y, const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                         const OptionalTensor& residual_scale) {
  const auto [partials, rows] = bn_stats(y);
  return bn_finalize(partials, rows, y.size(0), gamma, beta, eps, residual_scale);
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "bn_finalize", TORCH_BOX(&bn_finalize));
  implement(m, "bn_stats_finalize", TORCH_BOX(&bn_stats_finalize));
}

}  // namespace
}  // namespace fused_res::cpu
