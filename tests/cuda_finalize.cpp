// The finalize steps of the moment form, and move_statistics, on the CPU; tests/test_cuda_finalize.py is the client.
#include "cuda_serving.h"
//
#include "moments_finalize.cuh"
#include "move_statistics.cuh"
#include "pointwise_tail_backward_finalize.cuh"

namespace {

using namespace fused_res::cuda;
using cuda_serving::Request;

/// What a launcher would allocate on the device between two kernels, full of NaN.
struct Scratch {
  explicit Scratch(std::int64_t count) : memory(new double[count]) {
    std::memset(memory.get(), 0xff, count * sizeof(double));
  }
  operator double*() const { return memory.get(); }
  std::unique_ptr<double[]> memory;
};

// Brace lists are evaluated from left to right: they name the fields in the order in which the client sends them.

Sampling sampling(Request& r) {
  return {r.integer(),
          static_cast<int>(r.integer()),
          static_cast<int>(r.integer()),
          static_cast<int>(r.integer()),
          static_cast<int>(r.integer()),
          static_cast<int>(r.integer())};
}

Pixels pixels(Request& r) {
  return {r.parameter(), r.buffer<float>(), sampling(r), r.integer(), static_cast<int>(r.integer()), r.integer() != 0};
}

void serve_moments_finalize(Request& r) {
  const auto* numbers = r.buffer<double>();  // eps, ratio
  const Pixels z = pixels(r);
  const int channels = static_cast<int>(r.integer());
  const Parameter weight = r.parameter();
  const double *mean = r.buffer<double>(), *covariance = r.buffer<double>();
  const std::int64_t stretches = spread_stretches(z.channels);
  const Tiles tiles = direct_tiles(z.count, channels);
  const Scratch parts(stretches * kSpreadParts * channels), direct(tiles.count * 3 * channels);
  const Spreads spreads{parts, stretches, numbers[1]};
  spread({mean, covariance, weight, parts, channels, z.channels}, {});
  pointwise_direct({z, weight, {nullptr, spreads}, {}, nullptr, nullptr, direct, tiles.rows, channels}, {});
  moments_finalize({spreads, direct_partials(direct, tiles, z.count), r.parameter(), r.parameter(), r.parameter(),
                    r.buffer<float>(), r.buffer<bool>(), numbers[0], channels},
                   {});
}

void serve_scaled_weight(Request& r) {
  scaled_weight({r.parameter(), r.buffer<float>(), r.buffer<void>(), static_cast<int>(r.integer()),
                 static_cast<int>(r.integer()), r.integer() != 0},
                {});
}

void serve_tail_finalize(Request& r) {
  const double ratio = *r.buffer<double>();
  const Pixels z = pixels(r);
  const int channels = static_cast<int>(r.integer());
  const Parameter weight = r.parameter(), scaled = r.parameter(), dout = r.parameter(), gamma = r.parameter();
  const Parameter beta = r.parameter(), residual_scale = r.parameter();
  const auto* signs = r.buffer<std::uint8_t>();
  const double *total = r.buffer<double>(), *product = r.buffer<double>();
  const double *mean = r.buffer<double>(), *covariance = r.buffer<double>();
  const auto* suspect = r.buffer<bool>();
  const auto* vectors = r.buffer<float>();
  const std::int64_t stretches = spread_stretches(z.channels);
  const Tiles tiles = direct_tiles(z.count, channels);
  const Scratch parts(stretches * kSpreadParts * channels), direct(tiles.count * channels), shares(channels);
  const bool training = covariance != nullptr;
  const Suspects suspects{suspect, {parts, stretches, ratio}};
  if (training && suspect == nullptr) spread({mean, covariance, weight, parts, channels, z.channels}, {});
  if (training) pointwise_direct({z, weight, suspects, dout, signs, vectors, direct, tiles.rows, channels}, {});
  pointwise_tail_backward_finalize_rows(
      {total, product, weight, vectors, suspects, direct_partials(direct, tiles, z.count), gamma, beta, residual_scale,
       r.buffer<float>(), shares, z.count, channels, z.channels, training},
      {});
  pointwise_tail_backward_finalize({total, product, covariance, weight, scaled, vectors, shares, r.buffer<void>(),
                                    r.buffer<void>(), r.buffer<float>(), z.count, channels, z.channels},
                                   {});
}

/// Running statistics are written in place: they come as one buffer and leave as another. A unit may name the buffers
/// of an earlier one by its number.
void serve_move_statistics(Request& r) {
  std::vector<MovedUnit> units;
  std::vector<std::int64_t*> counts;
  for (std::int64_t left = r.integer(); left > 0; --left) {
    const std::int64_t shared = r.integer();
    const int channels = static_cast<int>(r.integer());
    const double pixels = static_cast<double>(r.integer()), momentum = *r.buffer<double>();
    const auto* vectors = r.buffer<float>();
    MovedUnit unit{nullptr, nullptr, vectors, pixels / (pixels - 1), momentum, channels, {}, {}};
    if (shared >= 0) {
      unit.mean = units[shared].mean, unit.mean_number = units[shared].mean_number;
      unit.var = units[shared].var, unit.var_number = units[shared].var_number;
      counts.push_back(counts[shared]);
    } else {
      const auto moved = [&](Number number) {
        const void* before = r.buffer<void>();
        void* to = r.buffer<void>();
        const int size = number == Number::kDouble ? 8 : number == Number::kFloat ? 4 : 2;
        std::memcpy(to, before, std::int64_t{channels} * size);
        return to;
      };
      unit.mean_number = r.number(), unit.var_number = r.number();
      unit.mean = moved(unit.mean_number), unit.var = moved(unit.var_number);
      const auto* before = r.buffer<std::int64_t>();
      counts.push_back(r.buffer<std::int64_t>());
      *counts.back() = *before;
    }
    units.push_back(unit);
  }
  move_statistics(units, counts, {});
}

void (*const kServers[])(Request&) = {serve_moments_finalize, serve_scaled_weight, serve_tail_finalize,
                                      serve_move_statistics};

}  // namespace

int main() { cuda_serving::serve(kServers); }
