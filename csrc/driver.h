// Launching a kernel whose handle somebody else has, by the CUDA driver that is in the process: Triton's kernels lie in
// its modules.
#pragma once

#include <cstdint>

namespace fused_res {

// Launches on a stream of the GPU `device`, whose context becomes the thread's where that has none. parameters: for
// each of the kernel's a pointer to its value.
void launch_kernel(int64_t function, int64_t programs, int64_t threads, int64_t shared, int64_t stream, int device,
                   void** parameters);

}  // namespace fused_res
