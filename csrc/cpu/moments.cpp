// moments on the CPU: blocks are centred and multiplied by themselves; the blocks are merged in double. And the BN that
// follows from them.
#include <vector>

#include "../moment_checks.h"
#include "parameters.h"
#include "products.h"
#include "spread.h"

namespace fused_res::cpu {
namespace {

// Elements of a block, about.
constexpr int64_t kBlockElements = 32 * 1024;

// One row of the covariance, from its diagonal on. With d the distance of a block's centre from the mean, and r what
// was left in the block's n rows about its centre, they add n d d' + r d' + d r' to the products about the centres.
template <class A>
void merge_row(const Tiling& t, int64_t width, const A* products, const std::vector<double>& distances,
               const double* rests, int64_t j, double* row) {
  std::fill(row + j, row + t.channels, 0.0);
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const A* from = products + (tile * t.channels + j) * width;
    for (int64_t k = j; k < t.channels; ++k) row[k] += static_cast<double>(from[k]);
  }
  for (int64_t first = 0, block = 0; first < t.pixels; first += t.block, ++block) {
    const double n = static_cast<double>(std::min(t.block, t.pixels - first));
    const double *d = distances.data() + block * t.channels, *r = rests + block * t.channels;
    const double both = n * d[j] + r[j], own = d[j];
    for (int64_t k = j; k < t.channels; ++k) row[k] += both * d[k] + own * r[k];
  }
  for (int64_t k = j; k < t.channels; ++k) row[k] /= static_cast<double>(t.pixels);
}

std::tuple<Tensor, Tensor> moments(const Tensor& z, const OptionalTensor& z_vectors, int64_t down, int64_t right) {
  check_activation("z", z, "z_vectors", z_vectors, down, right);
  const int64_t pixels = sampled(z, down, right), channels = z.size(3), width = whole_panels(channels);
  STD_TORCH_CHECK(pixels >= 1, "z: expected at least one row, got none");
  const int64_t item = arithmetic_size(z), bytes = channels * width * item;
  const int64_t block = block_rows(pixels, std::clamp<int64_t>(kBlockElements / width, kBlockRows, 512));
  const Tiling tiling = reduction_tiling(pixels, channels, block, 1, bytes);
  const int64_t blocks = divide_up(pixels, block);
  const Tensor mean = new_tensor(z, {channels}, ScalarType::Double);
  const Tensor covariance = new_tensor(z, {channels, channels}, ScalarType::Double);
  std::vector<double> centres(blocks * channels), rests(blocks * channels);
  void* products = partial_memory.get(tiling.tiles * bytes);
  const MomentsReduction arguments{tiling, activation(z, z_vectors, down, right), products, centres.data(),
                                   rests.data()};
  run_products(kernels().moments[dtype_of(z)], arguments, tiling.tiles, block_elements(block, channels) * item);

  double* m = static_cast<double*>(output(mean));
  std::fill(m, m + channels, 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    const double n = static_cast<double>(std::min(block, pixels - b * block));
    for (int64_t k = 0; k < channels; ++k) m[k] += n * centres[b * channels + k] + rests[b * channels + k];
  }
  for (int64_t k = 0; k < channels; ++k) m[k] /= static_cast<double>(pixels);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t k = 0; k < channels; ++k) centres[b * channels + k] -= m[k];
  }
  double* g = static_cast<double*>(output(covariance));
  const int64_t grain = std::max<int64_t>(1, kGrain / (channels * (tiling.tiles + blocks)));
  torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if (item == 8) {
        merge_row(tiling, width, static_cast<const double*>(products), centres, rests.data(), j, g + j * channels);
      } else {
        merge_row(tiling, width, static_cast<const float*>(products), centres, rests.data(), j, g + j * channels);
      }
    }
  });
  for (int64_t j = 0; j < channels; ++j) {
    for (int64_t k = 0; k < j; ++k) g[j * channels + k] = g[k * channels + j];
  }
  return {mean, covariance};
}

// Mean and variance of suspect channels are those of `direct`, if given.
std::tuple<Tensor, Tensor, int64_t> finalize_op(const Tensor& mean, const Tensor& covariance, const Tensor& weight,
                                                const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                                const OptionalTensor& residual_scale, double ratio,
                                                const OptionalTensor& direct) {
  check_moments_finalize(mean, covariance, weight, gamma, beta, residual_scale, direct);
  const int64_t channels = weight.size(0);
  SpreadRows rows(weight, covariance, ratio);
  std::vector<double> means(channels), vars(channels);
  Spread& spread = rows.get();
  spread.mean = static_cast<const double*>(data(mean));
  spread.means = means.data();
  spread.vars = vars.data();
  run_products(kernels().spread[dtype_of(weight)], spread, rows.tasks(), rows.bytes(0));
  const double* other = static_cast<const double*>(data(direct));
  const Affine affine(gamma, beta, eps, residual_scale);
  const Tensor vectors = fresh_statistics(weight, {kVectors, channels});
  const Result result(vectors);
  for (int64_t c = 0; c < channels; ++c) {
    const bool taken = other != nullptr && spread.suspect[c];
    affine.set(result, channels, c, taken ? other[c] : means[c], taken ? other[channels + c] : vars[c]);
  }
  return {vectors, *rows.suspect(), rows.suspects()};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "moments", TORCH_BOX(&moments));
  implement(m, "moments_finalize", TORCH_BOX(&finalize_op));
}

}  // namespace
}  // namespace fused_res::cpu
