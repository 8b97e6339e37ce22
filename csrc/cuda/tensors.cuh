// Between the operators' tensors and the kernels' plain arguments.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

#include "checks.h"
#include "launch.cuh"
#include "new_tensor.h"
#include "parameter.cuh"

// Weak: torch for CPUs has no such function, and a library that carries CUDA kernels must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device, void** stream);

namespace fused_res::cuda {

/// Makes a tensor's device the current one, and finds where its kernels run.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    // This library has a CUDA runtime of its own, linked statically.
    check(cudaSetDevice(device_));
    check(cudaDeviceGetAttribute(&queue_.multiprocessors, cudaDevAttrMultiProcessorCount, device_));
    check(cudaDeviceGetAttribute(&queue_.shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_));
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fused_res: this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    queue_.stream = static_cast<cudaStream_t>(stream);
  }

  const Queue& queue() const { return queue_; }

 private:
  std::int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Queue queue_{};
};

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const OptionalTensor& tensor) { return tensor ? data(*tensor) : nullptr; }
inline void* output(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
inline void* output(const OptionalTensor& tensor) { return tensor ? output(*tensor) : nullptr; }

inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(data(tensor)); }
inline const float* floats(const OptionalTensor& tensor) { return static_cast<const float*>(data(tensor)); }

inline const double* doubles(const Tensor& tensor) { return static_cast<const double*>(data(tensor)); }
inline const double* doubles(const OptionalTensor& tensor) { return static_cast<const double*>(data(tensor)); }

inline const std::uint8_t* bytes(const OptionalTensor& tensor) {
  return static_cast<const std::uint8_t*>(data(tensor));
}

inline Number any_number(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Number::kHalf;
    case ScalarType::BFloat16:
      return Number::kBFloat16;
    case ScalarType::Double:
      return Number::kDouble;
    default:
      return Number::kFloat;
  }
}

/// The format of activations, or of statistics, which must be one that the kernels compute with.
inline Number number_of(const char* name, const Tensor& tensor) {
  const Number number = any_number(tensor);
  STD_TORCH_CHECK(number != Number::kDouble, name, ": on a GPU, expected float32, float16 or bfloat16, got float64");
  return number;
}

inline Parameter parameter(const OptionalTensor& tensor) {
  return {data(tensor), tensor ? any_number(*tensor) : Number::kFloat};
}

inline int fewer_channels(const char* name, std::int64_t channels) {
  STD_TORCH_CHECK(channels <= std::numeric_limits<int>::max(), name, ": expected fewer than 2^31 channels, got ",
                  channels);
  return static_cast<int>(channels);
}

inline int channels_of(const char* name, const Tensor& tensor) {
  return fewer_channels(name, tensor.size(tensor.dim() - 1));
}

inline Layout layout_of(const char* name, const Tensor& y) {
  return make_layout(y.size(0), channels_of(name, y), group_of(number_of(name, y)));
}

}  // namespace fused_res::cuda
