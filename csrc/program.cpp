// Runs programs, and keeps them by number.
#include "program.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>

#include "checks.h"
#include "driver.h"

namespace fused_res {
namespace {

using torch::stable::detail::to;

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
    const auto status = torch_call_dispatcher(step.name.c_str(), step.overload.c_str(), stack, TORCH_ABI_VERSION);
    // fused_res/block/lowered.py knows the error by these words.
    STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "program: an operator of torch's failed: ", step.name);
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

// Room for the arguments of any call of a program, and the parameters of any launch.
struct Room {
  explicit Room(const Program& program)
      : stack(program.stack), values(program.parameters), parameters(program.parameters) {}
  std::vector<StableIValue> stack;
  std::vector<int64_t> values;
  std::vector<void*> parameters;
};

void launch(Tensors& tensors, const Launch& launch, int64_t stream, int device, Room& room) {
  for (size_t i = 0; i < launch.parameters.size(); ++i) {
    const Parameter& parameter = launch.parameters[i];
    room.values[i] = parameter.value;
    if (parameter.tensor) {
      void* address = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors.at(parameter.value), &address));
      room.values[i] = reinterpret_cast<int64_t>(address);
    }
    room.parameters[i] = &room.values[i];
  }
  launch_kernel(launch.function, launch.programs, launch.threads, launch.shared, stream, device,
                room.parameters.data());
  for (const int64_t index : launch.released) aoti_torch_delete_tensor_object(tensors.take({index, true}));
}

// Never destroyed: threads that are still there when the process ends may be running one.
struct Programs {
  std::shared_mutex mutex;
  std::map<int64_t, std::shared_ptr<const Program>> known;
  int64_t made = 0;
};

Programs& programs() {
  static auto* const all = new Programs;
  return *all;
}

int64_t make_program(std::string names, const std::vector<int64_t>& code, const std::vector<double>& numbers) {
  auto program = std::make_shared<const Program>(read_program(names, code, numbers));
  Programs& all = programs();
  const std::unique_lock lock(all.mutex);
  all.known.emplace(++all.made, std::move(program));
  return all.made;
}

std::shared_ptr<const Program> program_of(int64_t number) {
  Programs& all = programs();
  const std::shared_lock lock(all.mutex);
  const auto found = all.known.find(number);
  STD_TORCH_CHECK(found != all.known.end(), "program: there is no number ", number);
  return found->second;
}

std::vector<Tensor> run_program(int64_t number, const std::vector<Tensor>& inputs, int64_t stream) {
  const std::shared_ptr<const Program> program = program_of(number);
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == program->inputs, "inputs: expected ", program->inputs,
                  " tensors, got ", inputs.size());
  Tensors tensors(*program, inputs);
  Room room(*program);
  const int device = inputs.empty() ? 0 : static_cast<int>(inputs[0].get_device());
  for (const Step& step : program->steps) {
    switch (step.what) {
      case Step::What::kView:
        view(tensors, step);
        break;
      case Step::What::kCall:
        call(tensors, step, room.stack.data());
        break;
      case Step::What::kLaunch:
        launch(tensors, step.launch, stream, device, room);
        break;
    }
  }
  std::vector<Tensor> results;
  results.reserve(program->outputs.size());
  for (const Place& place : program->outputs) results.emplace_back(tensors.take(place));
  return results;
}

Tensor run_programs(const std::vector<int64_t>& numbers, const std::vector<int64_t>& counts, const Tensor& x,
                    const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(numbers.size() == counts.size(), "counts: expected ", numbers.size(), ", got ", counts.size());
  Tensor made = x;
  size_t at = 0;
  for (size_t i = 0; i < numbers.size(); ++i) {
    STD_TORCH_CHECK(counts[i] >= 0 && static_cast<size_t>(counts[i]) <= tensors.size() - at,
                    "tensors: there are not as many as counts say");
    std::vector<Tensor> inputs{made};
    inputs.insert(inputs.end(), tensors.begin() + at, tensors.begin() + at + counts[i]);
    at += counts[i];
    std::vector<Tensor> found = run_program(numbers[i], inputs, 0);
    STD_TORCH_CHECK(found.size() == 1, "program: expected one that returns one tensor, got ", found.size());
    made = std::move(found[0]);
  }
  STD_TORCH_CHECK(!numbers.empty() && at == tensors.size(), "tensors: there are more than counts say");
  return made;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CompositeExplicitAutograd, m) { m.impl("make_program", TORCH_BOX(&make_program)); }

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  m.impl("run_program", TORCH_BOX(&run_program));
  m.impl("run_programs", TORCH_BOX(&run_programs));
}
STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("run_program", TORCH_BOX(&run_program)); }
// On a CPU, with weights in oneDNN's own order.
STABLE_TORCH_LIBRARY_IMPL(fused_res, MkldnnCPU, m) {
  m.impl("run_program", TORCH_BOX(&run_program));
  m.impl("run_programs", TORCH_BOX(&run_programs));
}
// Without values, for what launches nothing.
STABLE_TORCH_LIBRARY_IMPL(fused_res, Meta, m) { m.impl("run_program", TORCH_BOX(&run_program)); }

// Functions of C and not operators: programs are freed wherever Python lets go of them, and nobody is to see that
// called.
extern "C" __attribute__((visibility("default"))) void fused_res_free_program(int64_t number) {
  Programs& all = programs();
  const std::unique_lock lock(all.mutex);
  all.known.erase(number);
}

extern "C" __attribute__((visibility("default"))) bool fused_res_has_kernel(const char* name) {
  return cpu::operators().count(name) > 0;
}

}  // namespace
}  // namespace fused_res
