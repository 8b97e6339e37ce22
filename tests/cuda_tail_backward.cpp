// The passes of `pointwise_tail_backward` on the CPU; tests/test_cuda_tail_backward.py is the client.
#include "ptx_on_cpu.h"
//
#include "cuda_serving_pixels.h"
#include "pointwise_tail_backward_apply.cuh"
#include "pointwise_tail_backward_reduce.cuh"

namespace {

using namespace fused_res::cuda;
using cuda_serving::activation;
using cuda_serving::Request;
using cuda_serving::scratch;

Incoming incoming(Request& r) { return {r.buffer<void>(), r.buffer<std::uint8_t>(), static_cast<int>(r.integer())}; }

void serve_reduce(Request& r) {
  const Number number = r.number();
  const Incoming g = incoming(r);
  const Activation z = activation(r);
  const std::int64_t C = g.channels, K = z.channels;
  const Tiles tiles = tail_reduce_tiles(z.pixels, C, K);
  const auto starts = scratch(tiles.count * K), totals = scratch(tiles.count * 2 * C);
  const auto products = scratch(tiles.count * C * K);
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
