// move_statistics on the CPU, in double: a few numbers for each channel.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "launch.h"

namespace fused_res::cpu {
namespace {

// running = (1 - momentum) * running + momentum * correction * batch
template <class R, class A>
void move(void* running, const void* batch, int64_t channels, double correction, double momentum) {
  R* to = static_cast<R*>(running);
  const A* from = static_cast<const A*>(batch);
  for (int64_t c = 0; c < channels; ++c) {
    const double old = static_cast<double>(static_cast<A>(to[c]));
    to[c] = static_cast<R>(static_cast<A>((1 - momentum) * old + momentum * correction * static_cast<double>(from[c])));
  }
}

using Move = void (*)(void*, const void*, int64_t, double, double);

template <class A>
Move move_of(Dtype running) {
  switch (running) {
    case kHalf:
      return move<torch::headeronly::Half, A>;
    case kBFloat16:
      return move<torch::headeronly::BFloat16, A>;
    case kDouble:
      return move<double, A>;
    default:
      return move<float, A>;
  }
}

void move_running(const Tensor& running, const Tensor& vectors, int64_t row, double correction, double momentum) {
  const bool doubles = vectors.scalar_type() == ScalarType::Double;
  const int64_t channels = vectors.size(1);
  const void* batch = static_cast<const char*>(data(vectors)) + row * channels * vectors.element_size();
  const Dtype dtype = dtype_of(running);
  (doubles ? move_of<double>(dtype) : move_of<float>(dtype))(output(running), batch, channels, correction, momentum);
}

// Units that share a BN move its statistics one after the other.
void move_statistics(const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                     const std::vector<Tensor>& counts, const std::vector<Tensor>& vectors,
                     const std::vector<int64_t>& pixels, const std::vector<double>& momenta) {
  check_move_statistics(means, variances, counts, vectors, pixels, momenta);
  for (const Tensor& count : counts) ++*static_cast<int64_t*>(output(count));
  for (size_t u = 0; u < means.size(); ++u) {
    const double n = static_cast<double>(pixels[u]);
    move_running(means[u], vectors[u], 0, 1, momenta[u]);
    move_running(variances[u], vectors[u], 1, n / (n - 1), momenta[u]);
  }
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) { implement(m, "move_statistics", TORCH_BOX(&move_statistics)); }

}  // namespace
}  // namespace fused_res::cpu
