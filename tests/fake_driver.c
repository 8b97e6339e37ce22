/* A CUDA driver that answers what Triton's run time asks and launches nothing, but for FAKE_SUM, which it computes itself, and
   FAKE_FAULT, which fails. FAKE_SHARED: the shared memory, in bytes, that a block may ask for. cuda.h comes with Triton. */
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { FUNCTIONS = 4096, MOST = 64, FAKE_SUM = 4001, FAKE_FAULT = 4002 };

static int launches, direct;
static CUstream last_stream;
static unsigned long digest;
static unsigned char sizes[FUNCTIONS][MOST];

int fake_launches(void) { return launches; }

/* How many of them were not Triton's own, and the stream of the last. */
int fake_direct(void) { return direct; }
unsigned long fake_stream(void) { return (unsigned long)last_stream; }

/* Says how many bytes each parameter of a function has: as many as are noted of a launch. */
void fake_sizes(unsigned long function, int count, const unsigned char* bytes) {
  memset(sizes[function % FUNCTIONS], 0, MOST);
  memcpy(sizes[function % FUNCTIONS], bytes, count < MOST ? count : MOST);
}

/* Of what has been launched since the last call: kernels in their order, each with its grid, its block, its shared memory, its
   stream and its parameters. */
unsigned long fake_digest(void) {
  unsigned long found = digest;
  digest = 0;
  return found;
}

static void add_to_digest(unsigned long number) { digest = (digest ^ number) * 1099511628211ul + 1; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = atoi(getenv("FAKE_SHARED"));
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 100;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuCtxGetDevice(CUdevice* device) { return cuDeviceGet(device, 0); }

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  static unsigned long functions;
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "the fake driver";
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

/* out = a + scale * b, of n elements; shifted by an integer of 64 bits, and with two parameters behind that nobody reads. */
static void sum(void** parameters) {
  float *out = *(float**)parameters[0], *a = *(float**)parameters[1], *b = *(float**)parameters[2];
  int n = *(int*)parameters[3];
  float scale = *(float*)parameters[4];
  long shift = *(long*)parameters[5];
  if (*(void**)parameters[6] != NULL || *(void**)parameters[7] != NULL) abort();
  for (int i = 0; i < n; i++) out[i] = a[i] + scale * b[i] + (float)shift;
}

static CUresult note(CUfunction function, unsigned programs, unsigned threads, unsigned shared, CUstream stream, void** parameters) {
  launches++;
  last_stream = stream;
  add_to_digest((unsigned long)function);
  add_to_digest(programs);
  add_to_digest(threads);
  add_to_digest(shared);
  add_to_digest((unsigned long)stream);
  for (int i = 0; i < MOST && sizes[(unsigned long)function % FUNCTIONS][i] != 0; i++) {
    unsigned long value = 0;
    memcpy(&value, parameters[i], sizes[(unsigned long)function % FUNCTIONS][i]);
    add_to_digest(value);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (config->numAttrs > 0) add_to_digest(config->numAttrs);
  return note(function, config->gridDimX, config->blockDimX, config->sharedMemBytes, config->hStream, parameters);
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                        unsigned threads_z, unsigned shared, CUstream stream, void** parameters, void** extra) {
  if (y * z * threads_y * threads_z != 1) return CUDA_ERROR_INVALID_VALUE;
  direct++;
  if ((unsigned long)function == FAKE_SUM) sum(parameters);
  if ((unsigned long)function == FAKE_FAULT) return CUDA_ERROR_ILLEGAL_ADDRESS;
  return note(function, x, threads, shared, stream, parameters);
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
