// A program from its numbers and names.
#include <torch/headeronly/core/MemoryFormat.h>

#include <algorithm>

#include "checks.h"
#include "program.h"

namespace fused_res {
namespace {

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
    for (int64_t rest = below(kMost); rest > 0; --rest) {
      made.steps.push_back(read_step());
      const Step& step = made.steps.back();
      made.stack = std::max({made.stack, step.arguments.size(), step.results.size()});
      made.parameters = std::max(made.parameters, step.launch.parameters.size());
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

  // 0 and a view, 1 and a call, or 2 and a launch.
  Step read_step() {
    Step step;
    step.what = static_cast<Step::What>(below(3));
    switch (step.what) {
      case Step::What::kView:
        read_view(step);
        break;
      case Step::What::kCall:
        read_call(step);
        break;
      case Step::What::kLaunch:
        read_launch(step.launch);
        break;
    }
    return step;
  }

  // The place of the source and whether that is the last to read it, the place of the result, sizes, strides, and how
  // many elements behind the source's first it starts.
  void read_view(Step& step) {
    Argument source{};
    source.places = {read_place()};
    step.arguments = {source};
    step.results = {{true, false, below(places_)}};
    step.sizes = several<int64_t>([this] { return next(); });
    step.strides = several<int64_t>([this] { return next(); });
    STD_TORCH_CHECK(step.sizes.size() == step.strides.size(), "program: a view of as many sizes as strides");
    step.offset = next();
  }

  // A name (of a CPU kernel of ours, or of an operator with its overload behind a point), arguments and results.
  void read_call(Step& step) {
    step.name = name();
    const size_t point = step.name.find('.');
    if (point == std::string::npos) {
      const auto found = cpu::operators().find(step.name);
      STD_TORCH_CHECK(found != cpu::operators().end(), "program: no kernel is called ", step.name);
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
  }

  // The function, the grid, threads, bytes; parameters, each 0 and its bytes, or 1 and a place; and the places to let
  // go of.
  void read_launch(Launch& launch) {
    launch.function = next();
    launch.programs = below(int64_t{1} << 31);
    launch.threads = below(1025);
    launch.shared = below(1 << 20);
    launch.parameters = several<Parameter>([this] {
      const bool tensor = below(2) == 1;
      return Parameter{tensor, tensor ? below(places_) : next()};
    });
    launch.released = several<int64_t>([this] { return below(places_); });
  }

  Place read_place() {
    const int64_t index = below(places_);
    return {index, below(2) == 1};
  }

  std::vector<Place> read_places() {
    return several<Place>([this] { return read_place(); });
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

  // 0 and an integer, 1 and a flag, 2 and which of the numbers, 3 and a memory format, 4 and a dtype, or 5 and a
  // device's type and one more than its index, or 0 for none.
  StableIValue read_plain() {
    using torch::headeronly::DeviceType;
    constexpr DeviceType types[] = {DeviceType::CPU, DeviceType::CUDA, DeviceType::Meta};
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
      default: {
        const DeviceType type = types[below(3)];
        return boxed(torch::stable::Device(type, static_cast<torch::stable::DeviceIndex>(below(128) - 1)));
      }
    }
  }

  const std::vector<int64_t>& code_;
  const std::vector<double>& numbers_;
  std::vector<std::string> names_;
  size_t at_ = 0;
  int64_t places_ = 0;
};

}  // namespace

Program read_program(const std::string& names, const std::vector<int64_t>& code, const std::vector<double>& numbers) {
  return Reader(names, code, numbers).program();
}

}  // namespace fused_res
