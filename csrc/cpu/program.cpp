// Programs: what a block's schedule calls, one operator after the other, without going back to Python in between.
// fused_res/block/lowered.py writes them, in numbers; what these mean is said at the functions that read them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>

#include "launch.h"

namespace fused_res::cpu {
namespace {

using torch::stable::detail::to;

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

// A view of the tensor in `arguments`, or a call: of a kernel of ours, or of an operator of torch's.
struct Step {
  bool view = false;
  Boxed kernel = nullptr;
  std::string name, overload;
  std::vector<Argument> arguments;
  std::vector<Result> results;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
};

struct Program {
  int64_t inputs = 0, places = 0;
  uint64_t stack = 0;
  std::vector<Step> steps;
  std::vector<Place> outputs;
};

// Reads a program from its numbers and names, and refuses what would reach beyond it.
class Reader {
 public:
  Reader(const std::string& names, const std::vector<int64_t>& code, const std::vector<double>& numbers)
      : code_(code), numbers_(numbers) {
    for (size_t at = 0, end = 0; at < names.size(); at = end + 1) {
      end = std::min(names.find(' ', at), names.size());
      names_.push_back(names.substr(at, end - at));
    }
  }

  // How many inputs and places there are, the steps, and the places that are returned.
  Program program() {
    Program made;
    made.inputs = below(kMost);
    made.places = places_ = below(kMost);
    STD_TORCH_CHECK(made.inputs <= places_, "program: expected at least as many places as inputs");
    made.steps.resize(below(kMost));
    for (Step& step : made.steps) {
      step = read_step();
      made.stack = std::max<uint64_t>({made.stack, step.arguments.size(), step.results.size()});
    }
    made.outputs = read_places();
    STD_TORCH_CHECK(at_ == code_.size(), "program: expected ", at_, " numbers, got ", code_.size());
    return made;
  }

 private:
  static constexpr int64_t kMost = 1 << 16;

  int64_t next() {
    STD_TORCH_CHECK(at_ < code_.size(), "program: it ends too early");
    return code_[at_++];
  }

  int64_t below(int64_t limit) {
    const int64_t value = next();
    STD_TORCH_CHECK(value >= 0 && value < limit, "program: expected a number from 0 to ", limit - 1, ", got ", value);
    return value;
  }

  const std::string& name() { return names_[below(static_cast<int64_t>(names_.size()))]; }

  template <class T, class Read>
  std::vector<T> several(Read read) {
    std::vector<T> found;
    for (int64_t rest = below(kMost); rest > 0; --rest) found.push_back(read());
    return found;
  }

  std::vector<Place> read_places() {
    return several<Place>([this] { return read_place(); });
  }

  // 0, its place and whether it is the last to read it, the place of the result, sizes, strides, and how many elements
  // behind the first it starts; or 1, a name (of ours, or of torch's with its overload), and arguments and results.
  Step read_step() {
    Step step;
    step.view = below(2) == 0;
    if (step.view) {
      Argument source{};
      source.places = {read_place()};
      step.arguments = {source};
      step.results = {{true, false, below(places_)}};
      step.sizes = several<int64_t>([this] { return next(); });
      step.strides = several<int64_t>([this] { return next(); });
      STD_TORCH_CHECK(step.sizes.size() == step.strides.size(), "program: a view of as many sizes as strides");
      step.offset = next();
      return step;
    }
    step.name = name();
    const size_t point = step.name.find('.');
    if (point == std::string::npos) {
      const auto found = operators().find(step.name);
      STD_TORCH_CHECK(found != operators().end(), "program: no kernel is called ", step.name);
      step.kernel = found->second;
    } else {
      step.overload = step.name.substr(point + 1);
      step.name.resize(point);
    }
    step.arguments = several<Argument>([this] { return read_argument(); });
    step.results = several<Result>([this] {
      const int64_t kind = below(3);  // no tensor, a tensor, one that may be missing
      const int64_t index = next();
      STD_TORCH_CHECK(index >= -1 && index < places_, "program: no place ", index);
      return Result{kind > 0, kind == 2, index};
    });
    return step;
  }

  Place read_place() {
    const int64_t index = below(places_);
    return {index, below(2) == 1};
  }

  // Its kind, whether the operator takes none, too, and its values or places.
  Argument read_argument() {
    Argument made{};
    made.kind = static_cast<Kind>(below(5));
    made.optional = below(2) == 1;
    switch (made.kind) {
      case Kind::kNone:
        break;
      case Kind::kPlain:
        made.plains = {read_plain()};
        break;
      case Kind::kPlains:
        made.plains = several<StableIValue>([this] { return read_plain(); });
        break;
      case Kind::kTensor:
        made.places = {read_place()};
        break;
      case Kind::kTensors:
        made.places = read_places();
        break;
    }
    return made;
  }

  // 0 and an integer, 1 and a flag, 2 and which of the numbers, 3 and a memory format, 4 and a dtype,
  // or 5 for the CPU.
  StableIValue read_plain() {
    switch (below(6)) {
      case 0:
        return boxed(next());
      case 1:
        return boxed(below(2) == 1);
      case 2:
        return boxed(numbers_[below(static_cast<int64_t>(numbers_.size()))]);
      case 3:
        return boxed(static_cast<torch::headeronly::MemoryFormat>(below(4)));
      case 4:
        return boxed(static_cast<ScalarType>(below(16)));
      default:
        return boxed(torch::stable::Device(torch::headeronly::DeviceType::CPU));
    }
  }

  const std::vector<int64_t>& code_;
  const std::vector<double>& numbers_;
  std::vector<std::string> names_;
  size_t at_ = 0;
  int64_t places_ = 0;
};

// The tensors of a run. Those of the inputs are the caller's.
class Tensors {
 public:
  Tensors(const Program& program, const std::vector<Tensor>& inputs)
      : inputs_(program.inputs), handles_(program.places, nullptr) {
    for (size_t i = 0; i < inputs.size(); ++i) handles_[i] = inputs[i].get();
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors() {
    for (size_t i = inputs_; i < handles_.size(); ++i) {
      if (handles_[i] != nullptr) aoti_torch_delete_tensor_object(handles_[i]);
    }
  }

  AtenTensorHandle at(int64_t index) const {
    STD_TORCH_CHECK(handles_[index] != nullptr, "program: nothing is in place ", index);
    return handles_[index];
  }

  // One that the receiver owns.
  AtenTensorHandle take(Place place) {
    AtenTensorHandle found = at(place.index);
    if (place.last && place.index >= inputs_) {
      handles_[place.index] = nullptr;
      return found;
    }
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(found, &made));
    return made;
  }

  void put(int64_t index, AtenTensorHandle tensor) {
    if (index >= inputs_ && handles_[index] == nullptr) {
      handles_[index] = tensor;
    } else {
      aoti_torch_delete_tensor_object(tensor);
    }
  }

 private:
  int64_t inputs_;
  std::vector<AtenTensorHandle> handles_;
};

StableIValue value_of(Tensors& tensors, const Argument& argument) {
  if (argument.kind == Kind::kNone) return boxed(std::nullopt);
  if (argument.kind == Kind::kPlain) return argument.plains[0];
  if (argument.kind == Kind::kTensor) return boxed(tensors.take(argument.places[0]));
  StableListHandle list = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(argument.plains.size() + argument.places.size(), &list));
  for (const StableIValue plain : argument.plains) TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, plain));
  for (const Place& place : argument.places) {
    TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, boxed(tensors.take(place))));
  }
  return boxed(list);
}

void view(Tensors& tensors, const Step& step) {
  const Place source = step.arguments[0].places[0];
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensors.at(source.index),
                                                        static_cast<int64_t>(step.sizes.size()), step.sizes.data(),
                                                        step.strides.data(), step.offset, &made));
  if (source.last) aoti_torch_delete_tensor_object(tensors.take(source));
  tensors.put(step.results[0].index, made);
}

void call(Tensors& tensors, const Step& step, StableIValue* stack) {
  for (size_t i = 0; i < step.arguments.size(); ++i) {
    const StableIValue value = value_of(tensors, step.arguments[i]);
    // As torch::stable boxes what may be none; whoever unboxes it frees it.
    const bool boxes = step.arguments[i].optional && step.arguments[i].kind != Kind::kNone;
    stack[i] = boxes ? boxed(new StableIValue(value)) : value;
  }
  if (step.kernel != nullptr) {
    step.kernel(stack, step.arguments.size(), step.results.size());
  } else {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(step.name.c_str(), step.overload.c_str(), stack, TORCH_ABI_VERSION));
  }
  for (size_t i = 0; i < step.results.size(); ++i) {
    const Result& result = step.results[i];
    if (!result.tensor) continue;
    if (!result.optional) {
      tensors.put(result.index, to<AtenTensorHandle>(stack[i]));
    } else if (auto* const found = to<StableIValue*>(stack[i])) {
      const std::unique_ptr<StableIValue> owned(found);
      tensors.put(result.index, to<AtenTensorHandle>(*owned));
    }
  }
}

std::shared_mutex mutex;
std::map<int64_t, std::shared_ptr<const Program>> programs;
int64_t made_so_far = 0;

int64_t make_program(std::string names, const std::vector<int64_t>& code, const std::vector<double>& numbers) {
  auto program = std::make_shared<const Program>(Reader(names, code, numbers).program());
  const std::unique_lock lock(mutex);
  programs.emplace(++made_so_far, std::move(program));
  return made_so_far;
}

void free_program(int64_t program) {
  const std::unique_lock lock(mutex);
  programs.erase(program);
}

std::vector<Tensor> run_program(int64_t number, const std::vector<Tensor>& inputs) {
  std::shared_ptr<const Program> program;
  {
    const std::shared_lock lock(mutex);
    const auto found = programs.find(number);
    STD_TORCH_CHECK(found != programs.end(), "program: there is no number ", number);
    program = found->second;
  }
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == program->inputs, "inputs: expected ", program->inputs,
                  " tensors, got ", inputs.size());
  Tensors tensors(*program, inputs);
  std::vector<StableIValue> stack(program->stack);
  for (const Step& step : program->steps) {
    if (step.view) {
      view(tensors, step);
    } else {
      call(tensors, step, stack.data());
    }
  }
  std::vector<Tensor> results;
  results.reserve(program->outputs.size());
  for (const Place& place : program->outputs) results.emplace_back(tensors.take(place));
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CompositeExplicitAutograd, m) {
  m.impl("make_program", TORCH_BOX(&make_program));
  m.impl("free_program", TORCH_BOX(&free_program));
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) { m.impl("run_program", TORCH_BOX(&run_program)); }

}  // namespace
}  // namespace fused_res::cpu
