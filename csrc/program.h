// Programs: what a block's schedule calls, one step after the other, without going back to Python in between.
// fused_res/block/lowered.py writes them, in numbers.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/operators.h"

namespace fused_res {

template <class T>
StableIValue boxed(T value) {
  return torch::stable::detail::from(value);
}

// A tensor in a place of the program's; `last`: nobody reads that place afterwards.
struct Place {
  int64_t index;
  bool last;
};

enum class Kind : int64_t { kNone, kPlain, kPlains, kTensor, kTensors };

struct Argument {
  Kind kind;
  bool optional;
  std::vector<StableIValue> plains;
  std::vector<Place> places;
};

// Where a result goes; index -1: nowhere. Results that are no tensors have none.
struct Result {
  bool tensor, optional;
  int64_t index;
};

// Of a GPU's kernel: the address of the tensor in a place, or eight bytes of which it reads as many as it takes.
struct Parameter {
  bool tensor;
  int64_t value;
};

// The driver's function, its grid, threads and bytes of shared memory of a block, what it is given, and the places that
// nobody reads afterwards.
struct Launch {
  int64_t function = 0, programs = 0, threads = 0, shared = 0;
  std::vector<Parameter> parameters;
  std::vector<int64_t> released;
};

// A view of the tensor in `arguments`; a call of a kernel of ours, or of an operator of torch's; or a launch.
struct Step {
  enum class What : int64_t { kView, kCall, kLaunch } what = What::kView;
  cpu::Boxed kernel = nullptr;
  std::string name, overload;
  std::vector<Argument> arguments;
  std::vector<Result> results;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
  Launch launch;
};

// stack: the most arguments, or results, of a call. parameters: the most of a launch.
struct Program {
  int64_t inputs = 0, places = 0;
  size_t stack = 0, parameters = 0;
  std::vector<Step> steps;
  std::vector<Place> outputs;
};

// Refuses what would reach beyond the program. Trusted are the sizes of views, that arguments and results are of their
// operator's types, and launches.
Program read_program(const std::string& names, const std::vector<int64_t>& code, const std::vector<double>& numbers);

}  // namespace fused_res
