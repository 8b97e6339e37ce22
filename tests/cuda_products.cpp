// Serves runs of single instructions and of the core of the CUDA kernels that multiply; tests/test_cuda_products.py is
// the client.
#include "ptx_on_cpu.h"
//
#include "cuda_serving.h"
#include "pointwise.cuh"

namespace {

using namespace fused_res::cuda;
using cuda_serving::Request;

// Single instructions, by one warp.

struct Instruction {
  const std::uint32_t* a;  // [32, 4], or 512 bytes of shared memory
  const std::uint32_t* b;  // [32, 2]
  const float* c;          // [32, 4]
  std::uint32_t* to;       // [32, 4]
  std::int64_t mode;
};

template <class T>
void multiply_kernel(Instruction i) {
  const std::uint32_t lane = threadIdx.x;
  float d[4];
  std::uint32_t a[4];
  for (int k = 0; k < 4; ++k) {
    d[k] = i.c[4 * lane + k];
    a[k] = i.a[4 * lane + k];
  }
  ptx::multiply<T>(d, a, i.b[2 * lane], i.b[2 * lane + 1]);
  for (int k = 0; k < 4; ++k) i.to[4 * lane + k] = __float_as_uint(d[k]);
}

struct Scratch {
  alignas(16) std::uint32_t word[128];
};

/// mode 0: load_matrices, 1: transposed. Lane l names line l, but for mode 2 and 3 line 31 - l.
void matrices_kernel(Instruction i) {
  Scratch& scratch = shared_memory<Scratch>();
  const std::uint32_t lane = threadIdx.x;
  ptx::copy_async(scratch.word + 4 * lane, i.a + 4 * lane, true);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncthreads();
  std::uint32_t to[4];
  const std::uint32_t* line = scratch.word + 4 * (i.mode < 2 ? lane : 31 - lane);
  if (i.mode % 2 == 0) {
    ptx::load_matrices(to, line);
  } else {
    ptx::load_matrices_transposed(to, line);
  }
  for (int k = 0; k < 4; ++k) i.to[4 * lane + k] = to[k];
}

/// What a lane finds of its copies, in three groups, of which the last is outside: before any wait, then after the
/// waits for one, two and three of them, 3 words each.
void copies_kernel(Instruction i) {
  Scratch& scratch = shared_memory<Scratch>();
  const std::uint32_t lane = threadIdx.x;
  std::uint32_t* to = i.to;
  for (int group = 0; group < 3; ++group) {
    if (lane < 8) ptx::copy_async(scratch.word + 4 * (8 * group + lane), i.a + 4 * (8 * group + lane), group < 2);
    ptx::commit_copies();
  }
  const auto look = [&](int after) {
    if (lane < 8) {
      for (int group = 0; group < 3; ++group) {
        to[(8 * after + lane) * 3 + group] = ptx::shared_load<std::uint32_t>(scratch.word + 4 * (8 * group + lane));
      }
    }
  };
  look(0);
  ptx::wait_copies<2>();
  look(1);
  ptx::wait_copies<1>();
  look(2);
  ptx::wait_copies<0>();
  look(3);
}

/// Each lane loads 16, 8 or 4 bytes `mode` words apart.
template <class V>
void banks_kernel(Instruction i) {
  struct Wide {
    alignas(1024) std::uint32_t word[4096];
  };
  Wide& memory = shared_memory<Wide>();
  const V value = ptx::shared_load<V>(memory.word + threadIdx.x * i.mode);
  std::uint32_t word;
  std::memcpy(&word, &value, 4);
  i.to[threadIdx.x] = word;
}

void tf32_kernel(Instruction i) {
  for (std::int64_t n = threadIdx.x; n < i.mode; n += 32) i.to[n] = ptx::to_tf32(i.a[n]);
}

void halves_kernel(Instruction i) { i.to[threadIdx.x] = ptx::halves(i.a[threadIdx.x]); }

/// Quotients of 128 numbers by `mode`.
void divide_kernel(Instruction i) {
  const Divider by(static_cast<int>(i.mode));
  for (unsigned n = threadIdx.x; n < 128; n += 32) i.to[n] = by.quotient(i.a[n]);
}

void serve_instruction(Request& r) {
  const std::int64_t kind = r.integer(), mode = r.integer();
  const Instruction i{r.buffer<std::uint32_t>(), r.buffer<std::uint32_t>(), r.buffer<float>(),
                      r.buffer<std::uint32_t>(), mode};
  void (*const kernels[])(Instruction) = {multiply_kernel<float>, multiply_kernel<Half>, multiply_kernel<BFloat16>,
                                          matrices_kernel,        copies_kernel,         banks_kernel<std::uint32_t>,
                                          banks_kernel<float2>,   banks_kernel<uint4>,   tf32_kernel,
                                          divide_kernel,          halves_kernel};
  launch(kernels[kind], 1, Queue{}, i, 32);
}

// The core by itself.

struct Plain {
  const void* first;
  const void* second;
  const float* vectors;
  float* to;
  std::int64_t rows;
  int columns, depth, begin, end;
  bool again;
};

/// to = first x second over a part of the depth; `again`: added up twice. The first operand goes through a BN and ReLU
/// if there are vectors.
template <class T, class Tiling, Major kFirst, Major kSecond, bool kWide>
void plain_kernel(Plain a) {
  using Core = Product<T, Tiling, kFirst, kSecond, kWide>;
  union alignas(512) Memory {
    typename Core::Memory product;
    typename Groups<float, Tiling>::Memory groups;
  };
  Memory& memory = shared_memory<Memory>();
  const TileOf tile = tile_of<Tiling>(a.rows, a.columns, Divider(tiles_across<Tiling>(a.columns)));
  constexpr bool kDepthFirst = kFirst == Major::kDepth, kDepthSecond = kSecond == Major::kDepth;
  const int rows = static_cast<int>(a.rows), width = kDepthFirst ? a.depth : rows;
  const Lines<T> first = lines_of<T>(a.first, kDepthFirst ? rows : a.depth, width);
  const Lines<T> second = lines_of<T>(a.second, kDepthSecond ? a.columns : a.depth, kDepthSecond ? a.depth : a.columns);
  Accumulators<Tiling> sum;
  for (int times = 0; times < (a.again ? 2 : 1); ++times) {
    Core::add(sum, memory.product, first, tile.row, activated<T>(a.vectors, width), second, tile.column, AsIs{},
              Range{a.begin, a.end});
  }
  const Place at = place_of<float, Tiling>(tile, a.columns);
  float* to = a.to + tile.row * a.columns + at.channel;
  Groups<float, Tiling>::each(
      sum, memory.groups, [](int) { return 0; },
      [&](int row, const float (&value)[4], int) {
        store<float, false>(to + row * a.columns, pack<float>(value), row < tile.left ? at.valid : 0);
      });
}

template <class T, Major kFirst, Major kSecond, bool kWide = true>
void plain(const Plain& a) {
  launch(plain_kernel<T, SmallTiling, kFirst, kSecond, kWide>, tiles_of<SmallTiling>(a.rows, a.columns), Queue{}, a,
         SmallTiling::kThreads);
}

/// All Majors, in 16 bits; of TF32, which has no transposed loads, and of what is not wide the ones that differ from
/// that.
void serve_plain(Request& r) {
  const Number number = r.number();
  const bool first = r.integer() != 0, second = r.integer() != 0, wide = r.integer() != 0;
  const Plain a{r.buffer<void>(),
                r.buffer<void>(),
                r.buffer<float>(),
                r.buffer<float>(),
                r.integer(),
                static_cast<int>(r.integer()),
                static_cast<int>(r.integer()),
                static_cast<int>(r.integer()),
                static_cast<int>(r.integer()),
                r.integer() != 0};
  constexpr Major kD = Major::kDepth, kE = Major::kExtent;
  if (number == Number::kFloat) {
    first ? plain<float, kE, kE>(a) : plain<float, kD, kD>(a);
  } else if (!wide) {
    first ? plain<BFloat16, kE, kE, false>(a) : plain<BFloat16, kD, kD, false>(a);
  } else if (first) {
    second ? plain<BFloat16, kE, kE>(a) : plain<BFloat16, kE, kD>(a);
  } else {
    second ? plain<BFloat16, kD, kE>(a) : plain<BFloat16, kD, kD>(a);
  }
}

void (*const kServers[])(Request&) = {serve_instruction, serve_plain};

}  // namespace

int main() { cuda_serving::serve(kServers); }
