// Run CUDA C++ kernels on the CPU, for tests: every thread of a block is a fiber; a barrier or a shuffle gives way.
//
// Included in place of the CUDA headers when g++ builds a kernel; what kernels say in PTX is in ptx_on_cpu.h. Their
// static
// __shared__ variables are left to the caller: shared_memory<T>() gives a block fresh memory, full of NaN and fenced by
// AddressSanitizer (build with -fsanitize=address,undefined, run with ASAN_OPTIONS=detect_stack_use_after_return=0).
// Fibers, warps and blocks run in random order, so that a missing barrier shows as a wrong result; a barrier that not
// all threads reach is an error; `faults` plants both on purpose.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

/// What to break in the next run; counts from 0, -1 breaks nothing.
struct Faults {
  int skipped_barrier = -1;  // this one of every thread's barriers is missing
  int absent_thread = -1;    // this thread of every block does not take part at all
  int skipped_wait = -1;     // this one of every thread's waits for copies is missing
  bool early = false;        // every wait leaves one group of copies more under way
  int displaced = 0;         // matrices are read so many bytes further on
  int unswizzled = 0;        // matrices are read (1) or copies written (2) without the swizzle, or both (3)
  bool swapped = false;      // two words of the first factor of every product are swapped
};
inline Faults faults;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned number;
  dim3 thread;
  State state;
  unsigned lanes;  // that must meet, while kAtWarp
  int barriers;    // met so far
};

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr unsigned kMostThreads = 1024, kLanes = 32;

inline std::mt19937 random_order;
inline ucontext_t scheduler;
inline Fiber* current;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline dim3 block_index, block_dim, grid_dim;
inline std::uint64_t exchanged[kMostThreads];
inline void (*before_block)() = [] {};
inline void (*after_block)() = [] {};
/// What there is to say of a run beside its results, a line each.
inline std::string (*remarks)() = [] { return std::string(); };

/// What a thread has found wrong; the first one stands. No exception leaves a fiber.
inline std::string failure;
inline void fail(const char* what) {
  if (failure.empty()) failure = what;
}

/// Aligned so that equal offsets are equal banks, and lines of 128 bytes alike.
struct Free {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{1024}); }
};
inline std::map<const void*, std::unique_ptr<char, Free>> block_memory;

inline void wait(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

inline void barrier() {
  if (current->barriers++ != faults.skipped_barrier) wait(State::kAtBarrier);
}

inline void meet(unsigned lanes) {
  current->lanes = lanes;
  wait(State::kAtWarp);
}

template <class T>
T exchange(unsigned lanes, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof exchanged[0]);
  std::memcpy(&exchanged[current->number], &value, sizeof value);
  meet(lanes);
  std::memcpy(&value, &exchanged[source], sizeof value);
  meet(lanes);
  return value;
}

inline void enter() {
  body();
  current->state = State::kDone;
}

inline void prepare(Fiber& fiber, unsigned number) {
  fiber.number = number;
  fiber.thread = dim3(number % block_dim.x, number / block_dim.x % block_dim.y, number / block_dim.x / block_dim.y);
  fiber.state = static_cast<int>(number) == faults.absent_thread ? State::kDone : State::kReady;
  fiber.barriers = 0;
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, enter, 0);
}

inline bool all_done() {
  return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::kDone; });
}

/// Let go the lanes of a warp that have met all whom they named. Threads that are done are not waited for, as on the
/// device. Returns whether any could go on.
inline bool release_warp(std::size_t first) {
  const std::size_t count = std::min<std::size_t>(kLanes, fibers.size() - first);
  bool released = false;
  for (std::size_t i = 0; i < count; ++i) {
    if (fibers[first + i].state != State::kAtWarp) continue;
    const unsigned lanes = fibers[first + i].lanes;
    const auto is_met = [&](std::size_t lane) {
      const Fiber& f = fibers[first + lane];
      return !(lanes >> lane & 1u) || f.state == State::kDone || (f.state == State::kAtWarp && f.lanes == lanes);
    };
    bool met = true;
    for (std::size_t lane = 0; lane < count; ++lane) met = met && is_met(lane);
    for (std::size_t lane = 0; met && lane < count; ++lane) {
      if (lanes >> lane & 1u && fibers[first + lane].state == State::kAtWarp)
        fibers[first + lane].state = State::kReady;
    }
    released = released || met;
  }
  return released;
}

/// Let go the block if all its threads have come to a barrier or are done.
inline bool release_block() {
  const auto at_barrier = [](const Fiber& f) { return f.state == State::kAtBarrier || f.state == State::kDone; };
  if (!std::all_of(fibers.begin(), fibers.end(), at_barrier)) return false;
  bool released = false;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::kAtBarrier) {
      fiber.state = State::kReady;
      released = true;
    }
  }
  return released;
}

inline bool any_ready() {
  return std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::kReady; });
}

/// Run the warp's lanes in random order until they wait for the block or, by chance, earlier: one warp may be far ahead
/// of another that nothing makes it wait for.
inline void run_warp(unsigned warp) {
  const unsigned first = warp * kLanes,
                 count = std::min<unsigned>(kLanes, static_cast<unsigned>(fibers.size()) - first);
  unsigned order[kLanes];
  std::iota(order, order + count, first);
  do {
    std::shuffle(order, order + count, random_order);
    for (unsigned i = 0; i < count; ++i) {
      if (fibers[order[i]].state != State::kReady) continue;
      current = &fibers[order[i]];
      swapcontext(&scheduler, &current->context);
    }
  } while (release_warp(first) && random_order() % 32 != 0);
}

inline void run_block(std::vector<unsigned>& warps) {
  block_memory.clear();
  failure.clear();
  before_block();
  for (unsigned i = 0; i < fibers.size(); ++i) prepare(fibers[i], i);
  do {
    std::shuffle(warps.begin(), warps.end(), random_order);
    for (unsigned warp : warps) run_warp(warp);
  } while (any_ready() || release_block());
  if (!failure.empty()) throw std::logic_error(failure);
  if (!all_done()) throw std::logic_error("some threads wait where the others never come");
  after_block();
}

/// kernel<<<grid, block>>>(arguments...)
template <class Kernel, class... Arguments>
void run(Kernel kernel, dim3 grid, dim3 block, const Arguments&... arguments) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMostThreads) throw std::invalid_argument("a block has 1 to 1024 threads");
  grid_dim = grid;
  block_dim = block;
  body = [&] { kernel(arguments...); };
  fibers.resize(threads);
  std::vector<unsigned> warps((threads + kLanes - 1) / kLanes), blocks(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(warps.begin(), warps.end(), 0u);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  for (unsigned i : blocks) {
    block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(warps);
  }
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->thread)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block_dim)
#define gridDim (cuda_on_cpu::grid_dim)

/// A block's shared memory, one T for each type; a kernel's `__shared__ T` built by nvcc.
template <class T>
T& shared_memory() {
  static const char key{};
  auto& memory = cuda_on_cpu::block_memory[&key];
  if (!memory) {
    memory.reset(static_cast<char*>(::operator new(sizeof(T), std::align_val_t{1024})));
    std::memset(memory.get(), 0xff, sizeof(T));
  }
  return *reinterpret_cast<T*>(memory.get());
}

inline void __syncthreads() { cuda_on_cpu::barrier(); }
inline void __syncwarp(unsigned lanes = ~0u) { cuda_on_cpu::meet(lanes); }

template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned by) {
  const unsigned me = cuda_on_cpu::current->number, lane = me % cuda_on_cpu::kLanes;
  return cuda_on_cpu::exchange(lanes, value, lane + by < cuda_on_cpu::kLanes ? me + by : me);
}

template <class T>
T __shfl_sync(unsigned lanes, T value, unsigned lane) {
  const unsigned me = cuda_on_cpu::current->number;
  return cuda_on_cpu::exchange(lanes, value, me / cuda_on_cpu::kLanes * cuda_on_cpu::kLanes + lane);
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, unsigned mask) {
  return cuda_on_cpu::exchange(lanes, value, cuda_on_cpu::current->number ^ mask);
}

using cudaStream_t = void*;

struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* from) {
  return *from;
}

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

inline float __fdividef(float a, float b) { return a / b; }

/// c, and the products of four pairs of signed bytes.
inline int __dp4a(int a, int b, int c) {
  for (int byte = 0; byte < 4; ++byte) {
    const auto of = [&](int word) {
      return static_cast<int>(static_cast<std::int8_t>(static_cast<unsigned>(word) >> 8 * byte));
    };
    c += of(a) * of(b);
  }
  return c;
}

inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct __half {
  std::uint16_t bits;
};
inline __half __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                                   : std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction),
                                                (exponent ? exponent : 1) - 25);
  return value.bits >> 15 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  const int exponent = magnitude > 0.f ? std::max(std::ilogb(magnitude), -14) : -14;
  const int digits = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<std::uint16_t>(sign | (((exponent + 14) << 10) + digits))};
}

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline std::uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const std::uint32_t bits = __float_as_uint(value);
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
