// Runs a model that AOTInductor has packaged, without Python: a program to copy. docs/serving.md says how to make and
// build both.
//
//     host MODEL.pt2 IMAGES.pt OUTPUT.pt [REQUESTS]
//
// IMAGES.pt is a tensor that torch.save wrote. OUTPUT.pt will be one for torch.load. Each request runs the model on all
// images, two at a time; their latencies are printed.

#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 2;

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  TORCH_CHECK(file, "cannot write ", path);
}

void serve(const char* model_path, const char* images_path, const char* output_path, int requests) {
  // The last argument is how many of its calls may run at once.
  torch::inductor::AOTIModelPackageLoader model(model_path, "model", /*run_single_threaded=*/false, kThreads);
  const at::Tensor images = torch::jit::pickle_load(read(images_path)).toTensor();
  std::vector<double> milliseconds(requests);
  std::vector<at::Tensor> outputs(requests);
  std::vector<std::exception_ptr> errors(kThreads);
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      try {
        c10::InferenceMode guard;
        for (int request = next++; request < requests; request = next++) {
          const auto start = std::chrono::steady_clock::now();
          outputs[request] = model.run({images}).at(0);
          const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - start;
          milliseconds[request] = passed.count();
        }
      } catch (...) {
        errors[thread] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  for (const at::Tensor& output : outputs) TORCH_CHECK(output.equal(outputs[0]), "requests have different outputs");
  write(output_path, torch::jit::pickle_save(outputs[0]));
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("%d requests of %d images, %d at a time: p50 %.2f ms, p95 %.2f ms\n", requests,
              static_cast<int>(images.size(0)), kThreads, milliseconds[(requests - 1) / 2],
              milliseconds[(requests - 1) * 95 / 100]);
}

}  // namespace

int main(int argc, char** argv) {
  const int requests = argc == 5 ? std::atoi(argv[4]) : 20;
  if (argc < 4 || argc > 5 || requests < 1) {
    std::fprintf(stderr, "usage: host MODEL.pt2 IMAGES.pt OUTPUT.pt [REQUESTS]\n");
    return 2;
  }
  try {
    serve(argv[1], argv[2], argv[3], requests);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
