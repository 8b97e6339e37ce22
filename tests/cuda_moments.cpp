// `moments` on the CPU; tests/test_cuda_moments.py is the client.
#include "ptx_on_cpu.h"
//
#include "cuda_serving.h"
#include "moments.cuh"

namespace {

using namespace fused_res::cuda;
using cuda_serving::Request;

Activation activation(Request& r) {
  const std::int64_t n = r.integer();
  const int height = static_cast<int>(r.integer()), width = static_cast<int>(r.integer());
  const int channels = static_cast<int>(r.integer()), down = static_cast<int>(r.integer());
  const int right = static_cast<int>(r.integer()), pixels = (width + right - 1) / right;
  const Sampling sampling{
      std::int64_t{height} * width, width, (height + down - 1) / down * pixels, pixels, down, right};
  const void* image = r.buffer<void>();
  return activation_of(image, r.buffer<float>(), n, channels, sampling);
}

void serve_moments(Request& r) {
  const Number number = r.number();
  const Activation z = activation(r);
  const Tiles tiles = moment_tiles(z.pixels, z.channels);
  const MomentsResult result{r.buffer<double>(), r.buffer<double>()};
  const std::int64_t K = z.channels, vectors = tiles.count * 2 * K, products = tiles.count * K * K;
  const auto memory = [](std::int64_t count) {
    std::unique_ptr<float[]> made(new float[count]);
    std::memset(made.get(), 0xff, count * sizeof(float));
    return made;
  };
  const auto found = memory(vectors), squares = memory(products);
  const MomentTiles a{z, found.get(), squares.get(), tiles.rows};
  if (number == Number::kFloat) moments<float>(a, result, {});
  if (number == Number::kHalf) moments<Half>(a, result, {});
  if (number == Number::kBFloat16) moments<BFloat16>(a, result, {});
}

void (*const kServers[])(Request&) = {serve_moments};

}  // namespace

int main() { cuda_serving::serve(kServers); }
