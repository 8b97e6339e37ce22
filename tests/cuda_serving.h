// Serves runs of CUDA kernels on the CPU over standard input and output; tests/cuda_emulator.py is the client.
//
// A request: kernel, seed, the faults to plant (int64 each); count and values of integers; count of buffers, and for
// each its size (-1: null), distance from 16-byte alignment, whether it is an output, and, if not, its bytes. The
// answer: 0, the bytes of all outputs, and the length and text of remarks, a line each; or the length of an error
// message and the message.
#pragma once

#include "cuda_on_cpu.h"
//
#include <cstdio>
#include <cstdlib>
#include <string>

#include "parameter.cuh"

namespace cuda_serving {

using fused_res::cuda::Number;
using fused_res::cuda::Parameter;
using fused_res::cuda::Type;

/// A device allocation: as large as asked for to the byte, so that AddressSanitizer sees every access beyond it.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data = nullptr;
  std::int64_t size = 0;
  bool output = false;
  std::vector<char> before;
};

struct Request {
  std::vector<std::int64_t> integers;
  std::vector<Buffer> buffers;
  std::size_t next_integer = 0, next_buffer = 0;

  std::int64_t integer() { return integers.at(next_integer++); }
  Number number() { return static_cast<Number>(integer()); }
  template <class T>
  T* buffer() {
    return reinterpret_cast<T*>(buffers.at(next_buffer++).data);
  }
  Parameter parameter() { return {buffer<void>(), number()}; }
};

/// Calls `run(Type<T>)` with a format of activations.
template <class Run>
void with_type(Number number, Run run) {
  if (number == Number::kFloat) run(Type<float>{});
  if (number == Number::kHalf) run(Type<fused_res::cuda::Half>{});
  if (number == Number::kBFloat16) run(Type<fused_res::cuda::BFloat16>{});
}

inline bool read(void* to, std::size_t size) { return std::fread(to, 1, size, stdin) == size; }

inline void write(const void* from, std::size_t size) {
  if (std::fwrite(from, 1, size, stdout) != size) std::exit(1);
}

inline std::int64_t read_integer() {
  std::int64_t value;
  if (!read(&value, sizeof value)) std::exit(0);
  return value;
}

inline Buffer read_buffer() {
  Buffer buffer;
  buffer.size = read_integer();
  const std::int64_t shift = read_integer();
  buffer.output = read_integer() != 0;
  if (buffer.size < 0) return buffer;
  buffer.memory.reset(new char[buffer.size + shift]);
  buffer.data = buffer.memory.get() + shift;
  std::memset(buffer.data, 0xff, buffer.size);
  if (!buffer.output) {
    if (!read(buffer.data, buffer.size)) std::exit(1);
    buffer.before.assign(buffer.data, buffer.data + buffer.size);
  }
  return buffer;
}

inline void serve_one(void (*const* servers)(Request&)) {
  const std::int64_t kernel = read_integer();
  cuda_on_cpu::random_order.seed(static_cast<unsigned>(read_integer()));
  cuda_on_cpu::Faults& faults = cuda_on_cpu::faults;
  faults.skipped_barrier = static_cast<int>(read_integer());
  faults.absent_thread = static_cast<int>(read_integer());
  faults.skipped_wait = static_cast<int>(read_integer());
  faults.early = read_integer() != 0;
  faults.displaced = static_cast<int>(read_integer());
  faults.unswizzled = static_cast<int>(read_integer());
  faults.swapped = read_integer() != 0;
  Request request;
  for (std::int64_t left = read_integer(); left > 0; --left) request.integers.push_back(read_integer());
  for (std::int64_t left = read_integer(); left > 0; --left) request.buffers.push_back(read_buffer());
  std::string message;
  try {
    servers[kernel](request);
    for (const Buffer& b : request.buffers) {
      if (!std::equal(b.before.begin(), b.before.end(), b.data)) throw std::logic_error("an input was written to");
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  const std::int64_t length = static_cast<std::int64_t>(message.size());
  write(&length, sizeof length);
  write(message.data(), message.size());
  for (const Buffer& b : request.buffers) {
    if (message.empty() && b.output && b.size > 0) write(b.data, b.size);
  }
  const std::string remarks = cuda_on_cpu::remarks();
  if (message.empty()) {
    const std::int64_t size = static_cast<std::int64_t>(remarks.size());
    write(&size, sizeof size);
    write(remarks.data(), remarks.size());
  }
  std::fflush(stdout);
}

/// Answers requests for the kernels of a table, until there are no more.
inline void serve(void (*const* servers)(Request&)) {
  for (;;) serve_one(servers);
}

}  // namespace cuda_serving
