#include "driver.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace fused_res {
namespace {

using Status = int;

// The driver's functions, as cuda.h declares them; nothing of it is linked against, so that the library loads without a
// GPU.
struct Driver {
  Status (*context)(void**);
  Status (*device)(int*, int);
  Status (*retain)(void**, int);
  Status (*enter)(void*);
  Status (*describe)(Status, const char**);
  Status (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
    STD_TORCH_CHECK(library != nullptr, "there is no CUDA driver: ", dlerror());
    find(library, "cuCtxGetCurrent", context);
    find(library, "cuDeviceGet", device);
    find(library, "cuDevicePrimaryCtxRetain", retain);
    find(library, "cuCtxSetCurrent", enter);
    find(library, "cuGetErrorString", describe);
    find(library, "cuLaunchKernel", launch);
  }

  void check(Status status) const {
    if (status == 0) return;
    const char* text = nullptr;
    describe(status, &text);
    STD_TORCH_CHECK(false, "CUDA error ", status, ": ", text == nullptr ? "unknown" : text);
  }

 private:
  template <class F>
  static void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    STD_TORCH_CHECK(function != nullptr, "the CUDA driver has no ", name);
  }
};

}  // namespace

void launch_kernel(int64_t function, int64_t programs, int64_t threads, int64_t shared, int64_t stream, int device,
                   void** parameters) {
  static const Driver driver;
  if (programs == 0) return;
  void* context = nullptr;
  driver.check(driver.context(&context));
  if (context == nullptr) {
    int handle = 0;
    driver.check(driver.device(&handle, device));
    driver.check(driver.retain(&context, handle));
    driver.check(driver.enter(context));
  }
  driver.check(driver.launch(reinterpret_cast<void*>(function), static_cast<unsigned>(programs), 1, 1,
                             static_cast<unsigned>(threads), 1, 1, static_cast<unsigned>(shared),
                             reinterpret_cast<void*>(stream), parameters, nullptr));
}

}  // namespace fused_res
