// The number formats of activations, and groups of 16 bytes of them. Kernels compute in float and convert at the
// border.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_res::cuda {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(double value) { return static_cast<float>(value); }
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}

template <class T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half narrow<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

/// Channels in 16 bytes: what one thread handles of a row, whether it moves them at once or one by one.
template <class T>
constexpr int kGroup = 16 / static_cast<int>(sizeof(T));

/// A group as it lies in memory, in registers. Words rather than an array of T: 16-bit registers do not exist.
struct Pack {
  std::uint32_t word[4];
};

/// The lower or the upper half of a word, in 16 bits.
template <class T>
__device__ __forceinline__ float half_of(std::uint32_t word, int upper) {
  // By name: a half that is cut out first is one instruction more.
  if constexpr (std::is_same_v<T, BFloat16>) return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
  return widen(T{static_cast<std::uint16_t>(word >> (16 * upper))});
}

template <class T>
__device__ __forceinline__ float get(const Pack& pack, int j) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(pack.word[j]);
  } else {
    return half_of<T>(pack.word[j / 2], j % 2);
  }
}

/// Two floats rounded to T, the first in the lower half of a word.
template <class T>
__device__ __forceinline__ std::uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<std::uint32_t>(narrow<T>(high).bits) << 16;
}
#ifdef __CUDACC__
// One instruction each, where the GPU has it.
template <>
__device__ __forceinline__ std::uint32_t narrow_pair<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}
template <>
__device__ __forceinline__ std::uint32_t narrow_pair<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}
#endif

/// Two floats as they are when stored in T.
template <class T>
__device__ __forceinline__ void round_pair(float& low, float& high) {
  if constexpr (sizeof(T) == 2) {
    const std::uint32_t word = narrow_pair<T>(low, high);
    low = half_of<T>(word, 0);
    high = half_of<T>(word, 1);
  }
}

/// Float values, rounded to T.
template <class T>
__device__ __forceinline__ Pack pack(const float (&value)[kGroup<T>]) {
  Pack result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      result.word[i] = __float_as_uint(value[i]);
    } else {
      result.word[i] = narrow_pair<T>(value[2 * i], value[2 * i + 1]);
    }
  }
  return result;
}

/// Whether the kernel writes to the memory that it loads from, which the read-only path must not be used for.
enum class Memory { kReadOnly, kWritten };

template <Memory kMemory, class T>
__device__ __forceinline__ T fetch(const T* from) {
  if constexpr (kMemory == Memory::kReadOnly) return __ldg(from);
  return *from;
}

/// The first `valid` elements at `from`, zeros for the others. kWide takes all or none, in one access of 16 bytes.
template <class T, bool kWide, Memory kMemory = Memory::kReadOnly>
__device__ __forceinline__ Pack load(const T* from, int valid) {
  Pack result{};
  if constexpr (kWide) {
    if (valid > 0) {
      const uint4 v = fetch<kMemory>(reinterpret_cast<const uint4*>(from));
      result = {{v.x, v.y, v.z, v.w}};
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      if (j < valid) {
        if constexpr (sizeof(T) == 4) {
          result.word[j] = __float_as_uint(fetch<kMemory>(from + j));
        } else {
          const std::uint32_t bits = fetch<kMemory>(&from[j].bits);
          result.word[j / 2] |= bits << (16 * (j % 2));
        }
      }
    }
  }
  return result;
}

template <class T, bool kWide>
__device__ __forceinline__ void store(T* to, const Pack& value, int valid) {
  if constexpr (kWide) {
    if (valid > 0) {
      // By name: nvcc has been seen to make four stores of an assignment.
      __stwb(reinterpret_cast<uint4*>(to), make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      if (j < valid) {
        if constexpr (sizeof(T) == 4) {
          to[j] = __uint_as_float(value.word[j]);
        } else {
          to[j].bits = static_cast<std::uint16_t>(value.word[j / 2] >> (16 * (j % 2)));
        }
      }
    }
  }
}

/// A group's part of a per-channel vector; zeros past the last channel.
template <bool kWide, int kCount>
__device__ __forceinline__ void load_vector(float (&to)[kCount], const float* from, int valid) {
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    const Pack part = load<float, kWide>(from + j, valid - j);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[j + i] = get<float>(part, i);
  }
}

template <bool kWide, int kCount>
__device__ __forceinline__ void store_vector(float* to, const float (&from)[kCount], int valid) {
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    store<float, kWide>(to + j, pack<float>({from[j], from[j + 1], from[j + 2], from[j + 3]}), valid - j);
  }
}

}  // namespace fused_res::cuda
