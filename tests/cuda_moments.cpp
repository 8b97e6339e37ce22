// `moments` on the CPU; tests/test_cuda_moments.py is the client.
#include "ptx_on_cpu.h"
//
#include "cuda_serving_pixels.h"
#include "moments.cuh"

namespace {

using namespace fused_res::cuda;
using cuda_serving::activation;
using cuda_serving::Request;
using cuda_serving::scratch;

void serve_moments(Request& r) {
  const Number number = r.number();
  const Activation z = activation(r);
  const Tiles tiles = moment_tiles(z.pixels, z.channels);
  const MomentsResult result{r.buffer<double>(), r.buffer<double>()};
  const std::int64_t K = z.channels, vectors = tiles.count * 2 * K, products = tiles.count * K * K;
  const auto found = scratch(vectors), squares = scratch(products);
  const MomentTiles a{z, found.get(), squares.get(), tiles.rows};
  if (number == Number::kFloat) moments<float>(a, result, {});
  if (number == Number::kHalf) moments<Half>(a, result, {});
  if (number == Number::kBFloat16) moments<BFloat16>(a, result, {});
}

void (*const kServers[])(Request&) = {serve_moments};

}  // namespace

int main() { cuda_serving::serve(kServers); }
