// move_statistics on a GPU.
#include "move_statistics.cuh"
#include "tensors.cuh"

namespace fused_res::cuda {
namespace {

void move_statistics_op(const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                        const std::vector<Tensor>& counts, const std::vector<Tensor>& vectors,
                        const std::vector<int64_t>& pixels, const std::vector<double>& momenta) {
  check_move_statistics(means, variances, counts, vectors, pixels, momenta);
  if (means.empty() && counts.empty()) return;
  const Tensor& like = means.empty() ? counts[0] : means[0];
  std::vector<std::int64_t*> counters;
  for (const Tensor& count : counts) {
    check_device("counts", count, like);
    counters.push_back(static_cast<std::int64_t*>(output(count)));
  }
  std::vector<MovedUnit> units;
  for (size_t u = 0; u < means.size(); ++u) {
    check_device("vectors", vectors[u], like);
    number_of("vectors", vectors[u]);
    const double n = static_cast<double>(pixels[u]);
    units.push_back({output(means[u]), output(variances[u]), floats(vectors[u]), n / (n - 1), momenta[u],
                     channels_of("vectors", vectors[u]), any_number(means[u]), any_number(variances[u])});
  }
  move_statistics(units, counters, OnDevice(like).queue());
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("move_statistics", TORCH_BOX(&move_statistics_op)); }

}  // namespace
}  // namespace fused_res::cuda
