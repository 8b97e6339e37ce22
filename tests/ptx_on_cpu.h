// The instructions of csrc/cuda/ptx.cuh on the CPU, lane by lane as the PTX manual lays them out.
//
// A copy is made when the wait that covers it is reached; until then its destination is full of NaN. Every access to
// shared memory is noted, and `conflicts` tells which ones meet in a bank. What hardware does and this does not:
// reorder memory accesses, keep the additions of a product in some order of its own, take time.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "cuda_on_cpu.h"
//
#include "number.cuh"

namespace cuda_on_cpu {

struct Copy {
  char* to;
  const char* from;
  bool inside;
};

struct Access {
  std::pair<const char*, int> place;  // in the sources
  std::uintptr_t address;
  int bytes;
};

/// What a thread does beside computing.
struct Work {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::vector<Access> accesses;
  int waits = 0;
  int collectives = 0;
};
inline std::vector<Work> works(kMostThreads);

inline Work& work() { return works[current->number]; }

/// Words that the lanes of a warp show each other. Two rounds of them: a lane that is ahead writes into the other one,
/// and cannot be two ahead.
struct Shown {
  std::uintptr_t address;
  std::uint32_t words[6];
};
inline Shown shown[2][kMostThreads];

/// What all lanes of the warp show, once all have come.
inline const Shown* show(const Shown& mine) {
  Shown(&round)[kMostThreads] = shown[work().collectives++ % 2];
  round[current->number] = mine;
  meet(~0u);
  return round + current->number / kLanes * kLanes;
}

/// Bank conflicts by place: of the lanes of a warp that access memory together, how many turns they take beyond the
/// least.
inline std::map<std::pair<const char*, int>, long> conflicts;

/// Of accesses at once of 128 bytes in all, the turns beyond one: a bank gives one word in each.
inline int turns_beyond_one(const std::uintptr_t* addresses, std::size_t count, int bytes) {
  std::uintptr_t words[kLanes];
  std::size_t size = 0;
  for (std::size_t i = 0; i < count; ++i) {
    for (int b = 0; b < bytes; b += 4) words[size++] = (addresses[i] + b) / 4;
  }
  std::sort(words, words + size);
  int turns[32] = {}, most = 1;
  for (std::size_t i = 0; i < size; ++i) {
    if (i == 0 || words[i] != words[i - 1]) most = std::max(most, ++turns[words[i] % 32]);
  }
  return most - 1;
}

/// The n-th access of every lane at the same place is one instruction of the warp. Neighbours whose accesses make up
/// 128 bytes access memory at once, those of them that are not left out.
inline void count_conflicts() {
  for (std::size_t warp = 0; warp < fibers.size(); warp += kLanes) {
    using Lane = std::pair<std::size_t, std::uintptr_t>;
    std::map<std::tuple<const char*, int, int>, std::vector<std::vector<Lane>>> instructions;
    for (std::size_t lane = 0; lane < std::min<std::size_t>(kLanes, fibers.size() - warp); ++lane) {
      std::map<std::tuple<const char*, int, int>, std::size_t> met;
      for (const Access& access : works[warp + lane].accesses) {
        const std::tuple key{access.place.first, access.place.second, access.bytes};
        auto& list = instructions[key];
        const std::size_t n = met[key]++;
        if (list.size() <= n) list.resize(n + 1);
        list[n].push_back({lane, access.address});
      }
    }
    for (const auto& [place, list] : instructions) {
      const auto [file, line, bytes] = place;
      const std::size_t at_once = 128 / bytes;
      for (const auto& lanes : list) {
        for (std::size_t first = 0; first < kLanes; first += at_once) {
          std::vector<std::uintptr_t> addresses;
          for (const auto& [lane, address] : lanes) {
            if (lane / at_once == first / at_once) addresses.push_back(address);
          }
          const int turns = turns_beyond_one(addresses.data(), addresses.size(), bytes);
          if (turns > 0) conflicts[{file, line}] += turns;
        }
      }
    }
  }
}

/// `conflicts` since the last call, a line each.
inline std::string told_conflicts() {
  std::string text;
  for (const auto& [place, count] : conflicts) {
    const std::string file = place.first;
    text += file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.second) + " " + std::to_string(count) + "\n";
  }
  conflicts.clear();
  return text;
}

/// Called when all threads of a block are done.
inline void finish_block() {
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    for (const auto& group : works[i].groups) {
      if (!group.empty()) throw std::logic_error("a thread ends and has not waited for all its copies");
    }
    if (!works[i].open.empty()) throw std::logic_error("a thread ends with copies of no group");
  }
  count_conflicts();
}

inline void start_block() {
  for (std::size_t i = 0; i < fibers.size(); ++i) works[i] = Work();
}

inline const bool hooked = [] {
  before_block = start_block;
  after_block = finish_block;
  remarks = told_conflicts;
  return true;
}();

/// An address as it would be without a swizzle of 16-byte chunks by the line of 128 bytes, or of 64, that it lies in.
inline std::uintptr_t unswizzled(std::uintptr_t address) { return address ^ (address >> 3 & 0x30); }

inline void note(const char* file, int line, const void* address, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fail("an access is not aligned to its size");
  work().accesses.push_back({{file, line}, reinterpret_cast<std::uintptr_t>(address), bytes});
}

inline void perform(const Copy& copy) {
  if (copy.inside) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

/// Element k, of two or one, of a word as `multiply` reads it.
template <class T>
float element(std::uint32_t word, int k) {
  using namespace fused_res::cuda;
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(word & ~0x1fffu);
  } else if constexpr (std::is_same_v<T, Half>) {
    static const std::vector<float> values = [] {
      std::vector<float> all(1 << 16);
      for (int bits = 0; bits < 1 << 16; ++bits) all[bits] = widen(Half{static_cast<std::uint16_t>(bits)});
      return all;
    }();
    return values[word >> (16 * k) & 0xffffu];
  } else {
    return widen(BFloat16{static_cast<std::uint16_t>(word >> (16 * k))});
  }
}

/// Tensor cores cut off what does not fit a float32.
inline float cut(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) && std::isfinite(sum) ? std::nextafter(nearest, 0.f)
                                                                                        : nearest;
}

}  // namespace cuda_on_cpu

namespace fused_res::cuda::ptx {

inline void copy_async(void* to, const void* from, bool inside, int line = __builtin_LINE(),
                       const char* file = __builtin_FILE()) {
  using namespace cuda_on_cpu;
  if (faults.unswizzled & 2) to = reinterpret_cast<void*>(unswizzled(reinterpret_cast<std::uintptr_t>(to)));
  note(file, line, to, 16);
  if (inside && reinterpret_cast<std::uintptr_t>(from) % 16 != 0) fail("the source of a copy is not aligned");
  std::memset(to, 0xff, 16);
  work().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), inside});
}

inline void commit_copies() {
  auto& work = cuda_on_cpu::work();
  work.groups.push_back(std::move(work.open));
  work.open.clear();
}

template <int kLeft>
void wait_copies() {
  using namespace cuda_on_cpu;
  auto& work = cuda_on_cpu::work();
  if (work.waits++ == faults.skipped_wait) return;
  const std::size_t left = kLeft + (faults.early ? 1 : 0);
  while (work.groups.size() > left) {
    for (const Copy& copy : work.groups.front()) perform(copy);
    work.groups.erase(work.groups.begin());
  }
}

inline void load_matrices(std::uint32_t (&to)[4], const void* row, int line = __builtin_LINE(),
                          const char* file = __builtin_FILE()) {
  using namespace cuda_on_cpu;
  auto address = reinterpret_cast<std::uintptr_t>(row) + faults.displaced;
  if (faults.unswizzled & 1) address = unswizzled(address);
  note(file, line, reinterpret_cast<const void*>(address), 16);
  const Shown* lanes = show({address, {}});
  const unsigned lane = current->number % kLanes;
  for (unsigned i = 0; i < 4; ++i) {
    std::memcpy(&to[i], reinterpret_cast<const char*>(lanes[8 * i + lane / 4].address) + lane % 4 * 4, 4);
  }
}

inline void load_matrices_transposed(std::uint32_t (&to)[4], const void* row, int line = __builtin_LINE(),
                                     const char* file = __builtin_FILE()) {
  using namespace cuda_on_cpu;
  auto address = reinterpret_cast<std::uintptr_t>(row) + faults.displaced;
  if (faults.unswizzled & 1) address = unswizzled(address);
  note(file, line, reinterpret_cast<const void*>(address), 16);
  const Shown* lanes = show({address, {}});
  const unsigned lane = current->number % kLanes;
  for (unsigned i = 0; i < 4; ++i) {
    std::uint16_t half[2];
    for (unsigned k = 0; k < 2; ++k) {
      std::memcpy(&half[k], reinterpret_cast<const char*>(lanes[8 * i + lane % 4 * 2 + k].address) + lane / 4 * 2, 2);
    }
    to[i] = half[0] | static_cast<std::uint32_t>(half[1]) << 16;
  }
}

template <class T>
void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  using namespace cuda_on_cpu;
  constexpr int kElements = std::is_same_v<T, float> ? 1 : 2;  // of a word
  const bool swapped = faults.swapped;
  const Shown* lanes = show({0, {a[0], a[swapped ? 2 : 1], a[swapped ? 1 : 2], a[3], b0, b1}});
  const unsigned lane = current->number % kLanes, group = lane / 4, member = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned lower = i / 2, column = 2 * member + i % 2;
    double sum = d[i];
    for (unsigned line = 0; line < 2; ++line) {
      for (unsigned word = 0; word < 4; ++word) {
        const std::uint32_t left = lanes[4 * group + word].words[2 * line + lower];
        const std::uint32_t right = lanes[4 * column + word].words[4 + line];
        for (int k = 0; k < kElements; ++k) {
          sum += static_cast<double>(element<T>(left, k)) * static_cast<double>(element<T>(right, k));
        }
      }
    }
    d[i] = cut(sum);
  }
}

inline std::uint32_t to_tf32(std::uint32_t bits) {
  return std::isfinite(__uint_as_float(bits)) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

template <class V>
void keep(V&) {}

inline float reciprocal(float v) { return 1.f / v; }

inline std::uint32_t tops(std::uint32_t a, std::uint32_t b) {
  std::uint32_t bytes = 0;
  for (int half = 0; half < 4; ++half) {
    if ((half < 2 ? a : b) >> (16 * (half % 2) + 15) & 1u) bytes |= 0xffu << (8 * half);
  }
  return bytes;
}

inline std::uint32_t halves(std::uint32_t bytes) {
  return (bytes & 0x80u ? 0xffffu : 0u) | (bytes & 0x8000u ? 0xffff0000u : 0u);
}

template <class V>
V shared_load(const void* from, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  cuda_on_cpu::note(file, line, from, sizeof(V));
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
void shared_store(void* to, const V& value, int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  cuda_on_cpu::note(file, line, to, sizeof(V));
  std::memcpy(to, &value, sizeof value);
}

}  // namespace fused_res::cuda::ptx
