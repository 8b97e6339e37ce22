// Launching a kernel, and choosing among its instances.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "rows.cuh"

#ifdef __CUDACC__
#include <stdexcept>
#include <string>
#endif

namespace fused_res::cuda {

enum class Number { kFloat, kHalf, kBFloat16, kDouble };

/// What shared memory a kernel can have by itself.
constexpr std::size_t kStaticMemory = 48 * 1024;

/// Where kernels run.
struct Queue {
  cudaStream_t stream;
  int multiprocessors;
  int shared_memory = 0;  // bytes of a multiprocessor
};

#ifdef __CUDACC__
inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fused_res: CUDA error: ") + cudaGetErrorString(error));
}

/// shared: bytes of what the kernel asks `large_shared_memory` for.
template <class Arguments>
void launch(void (*kernel)(Arguments), unsigned blocks, const Queue& queue, const Arguments& arguments,
            int threads = kThreads, std::size_t shared = 0) {
  if (blocks == 0) return;
  const int given = shared > kStaticMemory ? static_cast<int>(shared) : 0;
  if (given > 0) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               given));
  }
  kernel<<<blocks, threads, given, queue.stream>>>(arguments);
  check(cudaGetLastError());
}
#else
template <class Arguments>
void launch(void (*kernel)(Arguments), unsigned blocks, const Queue&, const Arguments& arguments,
            int threads = kThreads, std::size_t = 0) {
  if (blocks > 0) cuda_on_cpu::run(kernel, dim3(blocks), dim3(threads), arguments);
}
#endif

/// Whether rows can move in groups of 16 bytes: then every pointer (null or not) starts one, and so does every row.
inline bool moves_wide(int channels, int group, std::initializer_list<const void*> pointers) {
  bool wide = channels % group == 0;
  for (const void* pointer : pointers) wide = wide && reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  return wide;
}

template <class T>
struct Type {
  using type = T;
};

inline int group_of(Number number) { return number == Number::kFloat ? kGroup<float> : kGroup<Half>; }

/// Calls `run(Type<T>, std::bool_constant<wide>)`.
template <class Run>
void dispatch(Number number, bool wide, Run run) {
  const auto with_type = [&](auto type) { wide ? run(type, std::true_type{}) : run(type, std::false_type{}); };
  if (number == Number::kFloat) {
    with_type(Type<float>{});
  } else if (number == Number::kHalf) {
    with_type(Type<Half>{});
  } else {
    with_type(Type<BFloat16>{});
  }
}

}  // namespace fused_res::cuda
