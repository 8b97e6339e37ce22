// The passes of `pointwise_tail_backward` on the CPU; tests/test_cuda_tail_backward.py is the client.
#include "ptx_on_cpu.h"
//
#include "cuda_serving.h"
#include "pointwise_tail_backward.cuh"

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

Incoming incoming(Request& r) { return {r.buffer<void>(), r.buffer<std::uint8_t>(), static_cast<int>(r.integer())}; }

std::unique_ptr<float[]> memory(std::int64_t count) {
  std::unique_ptr<float[]> made(new float[count]);
  std::memset(made.get(), 0xff, count * sizeof(float));
  return made;
}

void serve_reduce(Request& r) {
  const Number number = r.number();
  const Incoming g = incoming(r);
  const Activation z = activation(r);
  const std::int64_t C = g.channels, K = z.channels;
  const Tiles tiles = tail_reduce_tiles(z.pixels, C, K);
  const auto starts = memory(tiles.count * K), totals = memory(tiles.count * 2 * C);
  const auto products = memory(tiles.count * C * K);
  const void* scaled = r.buffer<void>();
  void* through = r.buffer<void>();
  const TailReduce a{g, z, scaled, through, starts.get(), totals.get(), products.get(), tiles.rows};
  const TailSums sums{r.buffer<double>(), r.buffer<double>(), r.buffer<double>()};
  if (number == Number::kFloat) pointwise_tail_backward_reduce<float>(a, sums, {});
  if (number == Number::kHalf) pointwise_tail_backward_reduce<Half>(a, sums, {});
  if (number == Number::kBFloat16) pointwise_tail_backward_reduce<BFloat16>(a, sums, {});
}

/// dz is written in place where it is joined: it comes as the buffer `before` and leaves as the output.
void serve_apply(Request& r) {
  const Number number = r.number();
  TailApply a{};
  a.g = incoming(r);
  a.z = activation(r);
  a.scaled = r.buffer<void>();
  a.mean = r.buffer<double>();
  a.quadratic = r.buffer<void>();
  a.constant = r.buffer<float>();
  a.through = r.buffer<void>();
  const void* before = r.buffer<void>();
  a.dz = r.buffer<void>();
  a.partials = r.buffer<float>();
  const std::int64_t bytes = r.integer();
  a.joins = before != nullptr;
  if (a.joins) std::memcpy(a.dz, before, bytes);
  if (number == Number::kFloat) pointwise_tail_backward_apply<float>(a, {});
  if (number == Number::kHalf) pointwise_tail_backward_apply<Half>(a, {});
  if (number == Number::kBFloat16) pointwise_tail_backward_apply<BFloat16>(a, {});
}

void (*const kServers[])(Request&) = {serve_reduce, serve_apply};

}  // namespace

int main() { cuda_serving::serve(kServers); }
