// Serves runs of the kernels of 1x1 convolutions on the CPU; tests/test_cuda_pointwise.py is the client.
#include "ptx_on_cpu.h"
//
#include "cuda_serving.h"
#include "pointwise_fprop.cuh"
#include "pointwise_tail.cuh"

namespace {

using namespace fused_res::cuda;
using cuda_serving::Request;
using cuda_serving::with_type;

/// Images [n, height, width, channels] at a stride.
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

void serve_fprop(Request& r) {
  const Number number = r.number();
  const Tile tile = static_cast<Tile>(r.integer());
  const Activation x = activation(r);
  const PointwiseFprop a{x, r.buffer<void>(), r.buffer<void>(), r.buffer<float>(), static_cast<int>(r.integer())};
  with_type(number, [&](auto type) { pointwise_fprop<typename decltype(type)::type>(a, tile, {}); });
}

void serve_tail(Request& r) {
  const Number number = r.number();
  const Tile tile = static_cast<Tile>(r.integer());
  const auto branch = [&] { return Branch{activation(r), r.buffer<void>(), r.buffer<float>()}; };
  const PointwiseTail a{branch(),
                        branch(),
                        r.buffer<void>(),
                        r.buffer<float>(),
                        r.buffer<void>(),
                        r.buffer<std::uint8_t>(),
                        static_cast<int>(r.integer())};
  with_type(number, [&](auto type) { pointwise_tail<typename decltype(type)::type>(a, tile, {}); });
}

/// The tile of a tail, with a projection or without, where a multiprocessor has so many bytes of shared memory.
void serve_tail_tile(Request& r) {
  PointwiseTail a{};
  a.main.z.pixels = r.integer();
  a.channels = static_cast<int>(r.integer());
  a.projection.weight = r.integer() != 0 ? &a : nullptr;
  *r.buffer<std::int64_t>() = static_cast<std::int64_t>(tail_tile(a, {nullptr, 1, static_cast<int>(r.integer())}));
}

void (*const kServers[])(Request&) = {serve_fprop, serve_tail, serve_tail_tile};

}  // namespace

int main() { cuda_serving::serve(kServers); }
