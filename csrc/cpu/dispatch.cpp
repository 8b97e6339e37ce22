// Chooses the instruction set.
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fused_res::cpu {

namespace plain {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
#endif

namespace {

struct Variant {
  const Kernels* kernels;
  bool (*runs_here)();
};

// Best first.
const Variant variants[] = {
#if defined(__x86_64__)
    {&avx512bf16::table, [] { return variants[1].runs_here() && __builtin_cpu_supports("avx512bf16") != 0; }},
    {&avx512::table,
     [] {
       return variants[2].runs_here() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {&avx2::table,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {&plain::table, [] { return true; }},
};

const Kernels* find(const char* name) {
  for (const Variant& variant : variants) {
    const bool asked = name == nullptr || std::strcmp(name, variant.kernels->name) == 0;
    if (asked && variant.runs_here()) return variant.kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  if (found == nullptr) {
    const char* asked = std::getenv("FUSED_RES_CPU_CAPABILITY");
    found = find(asked);
    STD_TORCH_CHECK(found != nullptr, "FUSED_RES_CPU_CAPABILITY: this CPU or this library has no ", asked);
    chosen.store(found, std::memory_order_relaxed);
  }
  return *found;
}

}  // namespace fused_res::cpu

// For tests: switches to the instruction set of this name, or to the best for null. False where this CPU lacks it.
extern "C" __attribute__((visibility("default"))) bool fused_res_set_cpu_capability(const char* name) {
  const auto* found = fused_res::cpu::find(name);
  if (found != nullptr) fused_res::cpu::chosen.store(found);
  return found != nullptr;
}

extern "C" __attribute__((visibility("default"))) const char* fused_res_cpu_capability() {
  return fused_res::cpu::kernels().name;
}
