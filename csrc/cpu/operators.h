// The CPU's kernels by the names of their operators: programs call them without torch's dispatcher in between.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <unordered_map>

namespace fused_res::cpu {

// As torch::stable's libraries take them: arguments are taken from the stack, results put there.
using Boxed = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

inline std::unordered_map<std::string, Boxed>& operators() {
  static std::unordered_map<std::string, Boxed> known;
  return known;
}

// Registers the kernel of an operator.
inline void implement(torch::stable::detail::StableLibrary& library, const char* name, Boxed kernel) {
  library.impl(name, kernel);
  operators().emplace(name, kernel);
}

}  // namespace fused_res::cpu
