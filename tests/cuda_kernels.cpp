// The kernels of BN on the CPU; tests/test_cuda_kernels.py is the client.
#include "cuda_serving.h"
//
#include "bn_act.cuh"
#include "bn_act_backward.cuh"
#include "bn_finalize.cuh"
#include "bn_stats.cuh"
#include "masked_add.cuh"

namespace {

using namespace fused_res::cuda;
using cuda_serving::Request;

struct Toy {
  const float* from;
  float* to;
  std::int64_t size;
  std::int64_t fault;
};

struct ToyScratch {
  float value[kThreads];
};

/// Reverses up to 256 numbers through shared memory; with one fault or another.
void toy_kernel(Toy a) {
  ToyScratch& scratch = shared_memory<ToyScratch>();
  const int i = static_cast<int>(threadIdx.x);
  if (i < a.size) scratch.value[i] = a.from[i];
  if (a.fault == 1) scratch.value[i + 1] = 0.f;
  if (a.fault == 2 && i % 2 == 0) __syncwarp();
  __syncthreads();
  if (i < a.size) a.to[i] = scratch.value[a.size - 1 - i];
  if (a.fault == 3 && i == a.size) a.to[i] = 0.f;
}

// Brace lists are evaluated from left to right: they name the fields in the order in which the client sends them.

void serve_stats(Request& r) {
  const Number number = r.number();
  const std::int64_t P = r.integer(), tiles = r.integer(), rows = r.integer();
  const int C = static_cast<int>(r.integer());
  BnStats a{r.buffer<void>(), r.buffer<float>(), rows, make_layout(P, C, group_of(number))};
  bn_stats(a, number, tiles, {});
}

void serve_finalize(Request& r) {
  BnFinalize a{r.buffer<float>(),
               r.parameter(),
               r.parameter(),
               r.parameter(),
               r.buffer<float>(),
               r.integer(),
               r.integer(),
               r.integer(),
               r.integer(),
               static_cast<int>(r.integer()),
               1e-5f};
  bn_finalize(a, {});
}

void serve_act(Request& r) {
  const Number number = r.number();
  const Shortcut shortcut = static_cast<Shortcut>(r.integer());
  const std::int64_t P = r.integer(), C = r.integer();
  BnAct a{r.buffer<void>(),
          r.buffer<float>(),
          r.buffer<void>(),
          r.buffer<float>(),
          r.buffer<void>(),
          r.buffer<std::uint8_t>(),
          make_layout(P, static_cast<int>(C), group_of(number))};
  bn_act(a, number, shortcut, {nullptr, static_cast<int>(r.integer())});
}

void serve_reduce(Request& r) {
  const Number number = r.number();
  const Relu relu = static_cast<Relu>(r.integer());
  const std::int64_t P = r.integer(), tiles = r.integer(), rows = r.integer(), C = r.integer();
  BnActBackwardReduce a{r.buffer<void>(),
                        r.buffer<void>(),
                        r.buffer<float>(),
                        r.buffer<std::uint8_t>(),
                        r.buffer<void>(),
                        r.buffer<float>(),
                        r.buffer<float>(),
                        rows,
                        make_layout(P, static_cast<int>(C), group_of(number))};
  bn_act_backward_reduce(a, number, relu, tiles, {});
}

void serve_backward_finalize(Request& r) {
  BnActBackwardFinalize a{r.buffer<float>(),
                          r.buffer<float>(),
                          r.parameter(),
                          r.parameter(),
                          r.parameter(),
                          r.buffer<float>(),
                          r.integer(),
                          r.integer(),
                          static_cast<int>(r.integer()),
                          static_cast<int>(r.integer()),
                          static_cast<int>(r.integer()),
                          r.integer() != 0};
  bn_act_backward_finalize(a, {});
}

void serve_apply(Request& r) {
  const Number number = r.number();
  const Relu relu = static_cast<Relu>(r.integer());
  const std::int64_t P = r.integer(), C = r.integer();
  const auto bn = [&] { return BackwardBn{r.buffer<void>(), r.buffer<float>(), r.buffer<void>(), r.integer() != 0}; };
  BnActBackwardApply a{r.buffer<void>(),
                       r.buffer<float>(),
                       r.buffer<std::uint8_t>(),
                       bn(),
                       bn(),
                       r.buffer<void>(),
                       make_layout(P, static_cast<int>(C), group_of(number))};
  bn_act_backward_apply(a, number, relu, {nullptr, static_cast<int>(r.integer())});
}

/// dx is written in place: it comes as the buffer `before` and leaves as the output.
void serve_add(Request& r) {
  const Number number = r.number();
  const std::int64_t N = r.integer();
  const int C = static_cast<int>(r.integer()), height = static_cast<int>(r.integer());
  const int width = static_cast<int>(r.integer()), down = static_cast<int>(r.integer());
  const int right = static_cast<int>(r.integer()), multiprocessors = static_cast<int>(r.integer());
  const int w = (width + right - 1) / right, area = (height + down - 1) / down * w;
  const void* addend = r.buffer<void>();
  const auto* signs = r.buffer<std::uint8_t>();
  const void* before = r.buffer<void>();
  void* dx = r.buffer<void>();
  std::memcpy(dx, before, N * height * width * C * (number == Number::kFloat ? 4 : 2));
  const Sampling sampling{std::int64_t{height} * width, width, area, w, down, right};
  masked_add({addend, signs, dx, sampling, make_layout(N * area, C, group_of(number))}, number,
             {nullptr, multiprocessors});
}

void serve_tiles(Request& r) {
  std::int64_t* to = r.buffer<std::int64_t>();
  const std::int64_t P = r.integer();
  const Tiles tiles = row_tiles(P, static_cast<int>(r.integer()));
  to[0] = tiles.count;
  to[1] = tiles.rows;
}

void serve_widen(Request& r) {
  const Number number = r.number();
  const auto* from = r.buffer<std::uint16_t>();
  float* to = r.buffer<float>();
  auto* back = r.buffer<std::uint16_t>();
  for (std::int64_t i = 0, size = r.integer(); i < size; ++i) {
    to[i] = number == Number::kHalf ? widen(Half{from[i]}) : widen(BFloat16{from[i]});
    back[i] = number == Number::kHalf ? narrow<Half>(to[i]).bits : narrow<BFloat16>(to[i]).bits;
  }
}

void serve_narrow(Request& r) {
  const Number number = r.number();
  const auto* from = r.buffer<float>();
  auto* to = r.buffer<std::uint16_t>();
  for (std::int64_t i = 0, size = r.integer(); i < size; ++i) {
    to[i] = number == Number::kHalf ? narrow<Half>(from[i]).bits : narrow<BFloat16>(from[i]).bits;
  }
}

void serve_toy(Request& r) {
  launch(toy_kernel, 1, Queue{}, Toy{r.buffer<float>(), r.buffer<float>(), r.integer(), r.integer()});
}

void (*const kServers[])(Request&) = {serve_stats, serve_finalize, serve_act,   serve_reduce, serve_backward_finalize,
                                      serve_apply, serve_add,      serve_tiles, serve_widen,  serve_narrow,
                                      serve_toy};

}  // namespace

int main() { cuda_serving::serve(kServers); }
