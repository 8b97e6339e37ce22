// Instructions that C++ has no words for: copies that run on beside the threads, and matrix products of a warp.
//
// Layouts are those of the PTX manual. A warp's 32 lanes are 8 groups of 4, lane = 4 * group + member. In the words of
// 4 bytes that lines of 16 bytes are made of, two elements of 16 bits or one TF32 value, all formats are alike:
// `multiply` takes 16 rows and 8 columns, each over a depth of two such lines, 16 or 8 elements.
#pragma once

#include "number.cuh"

#ifdef __CUDACC__
namespace fused_res::cuda::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Turing has none of these. What runs there is asked beforehand (fused_res/backends/native.py), so nobody comes here.
#define FUSED_RES_PTX(...) __trap()
#else
#define FUSED_RES_PTX(...) asm volatile(__VA_ARGS__)
#endif

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

/// Copy 16 bytes to shared memory, or put zeros there and read nothing, some time before the wait for their group.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  FUSED_RES_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0) : "memory");
}

/// The thread's copies since the last call are a group.
__device__ __forceinline__ void commit_copies() { FUSED_RES_PTX("cp.async.commit_group;" :: : "memory"); }

/// Wait until no more than kLeft of the thread's groups are under way. What others copied is there after a barrier.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  FUSED_RES_PTX("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

/// Four matrices of 8 lines of 16 bytes, lines that the lanes 8 * i to 8 * i + 7 name: of matrix i a lane receives the
/// word `member` of line `group`.
__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], const void* line) {
  FUSED_RES_PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]),
                "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(line)) : "memory");
}

/// The same of elements of 16 bits, transposed: the elements `group` of the lines 2 * member and 2 * member + 1.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&to)[4], const void* line) {
  FUSED_RES_PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]),
                "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(line)) : "memory");
}

/// d += a * b. Words of a: of row `group` and `group + 8` of the first line, then of the second; of b: of column
/// `group` of the first line and of the second; of d: the columns 2 * member and 2 * member + 1 of row `group` and
/// `group + 8`.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1);

#define FUSED_RES_MULTIPLY(T, INSTRUCTION)                                                                            \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply<T>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,           \
                                              std::uint32_t b1) {                                                     \
    FUSED_RES_PTX("mma.sync.aligned." INSTRUCTION                                                                     \
                  " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),                    \
                  "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); \
  }
FUSED_RES_MULTIPLY(Half, "m16n8k16.row.col.f32.f16.f16.f32")
FUSED_RES_MULTIPLY(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSED_RES_MULTIPLY(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSED_RES_MULTIPLY

/// A float32 rounded to TF32, to the nearest and away from 0 between two: `multiply` itself would cut its last 13 bits
/// off.
__device__ __forceinline__ std::uint32_t to_tf32(std::uint32_t bits) {
  std::uint32_t rounded = 0;
  FUSED_RES_PTX("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
#undef FUSED_RES_PTX

/// Have the compiler keep what a loop needs in a register, and not work it out anew in every step.
__device__ __forceinline__ void keep(int& value) { asm("" : "+r"(value)); }
template <class V>
__device__ __forceinline__ void keep(V*& pointer) {
  asm("" : "+l"(pointer));
}

/// 1 / v, to the last bit or the one before it, of a v that is neither 0 nor near it.
__device__ __forceinline__ float reciprocal(float v) {
  float found;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(v));
  return found;
}

/// Four bytes, each all ones where the top bit of a half is set: of the lower and the upper half of a, then of b.
__device__ __forceinline__ std::uint32_t tops(std::uint32_t a, std::uint32_t b) {
  std::uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(bytes) : "r"(a), "r"(b));
  return bytes;
}

/// A word of two halves, each all ones or all zeros as the top bit of the lowest and of the second byte says.
__device__ __forceinline__ std::uint32_t halves(std::uint32_t bytes) {
  std::uint32_t mask;
  asm("prmt.b32 %0, %1, %1, 0x9988;" : "=r"(mask) : "r"(bytes));
  return mask;
}

/// Accesses of 4, 8 or 16 bytes to shared memory. By name, for under test their bank conflicts are counted.
template <class V>
__device__ __forceinline__ V shared_load(const void* from) {
  return *static_cast<const V*>(from);
}

template <class V>
__device__ __forceinline__ void shared_store(void* to, const V& value) {
  *static_cast<V*>(to) = value;
}

}  // namespace fused_res::cuda::ptx
#endif
