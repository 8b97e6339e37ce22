// A block of a product at a time, and what is to be done with it while it is in the cache.
#pragma once

#include "masked_add_kernel.h"
#include "matrix_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// Bytes of a matrix that are still near when the next block of rows is multiplied by it.
constexpr int64_t kStays = 256 * 1024;

// Multiplies blocks of rows of an operand by stretches of columns of a matrix; a block is read once for all stretches.
template <class T>
class Multiplier {
 public:
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;

  Multiplier(const Factors& factors, int64_t rows, Scratch& scratch)
      : factors_(factors), memory_(*this ? scratch.take<A>(rows, factors.left.channels) : nullptr) {}

  explicit operator bool() const { return factors_.right != nullptr; }

  // Rows first to first + n, columns from to from + columns, which begin with a panel.
  void run(int64_t first, int64_t n, int64_t from, int64_t columns, A* to, int64_t to_row, bool add, Ahead& ahead) {
    if (first != first_) block_ = read_block<T>(factors_.left, first, n, memory_);
    first_ = first;
    const int64_t depth = factors_.left.channels;
    const A* right = static_cast<const A*>(factors_.right) + from * depth;
    const int64_t whole = whole_panels<V>(columns);
    const A* next = whole * depth * static_cast<int64_t>(sizeof(A)) > kStays ? right : nullptr;
    multiply<V>(n, depth, whole, block_.rows, block_.row, right, to, to_row, add, ahead, next);
  }

 private:
  const Factors& factors_;
  A* memory_;
  Block<A> block_{};
  int64_t first_ = -1;
};

template <class T>
void product(const Product& a, int64_t begin, int64_t end, void* memory) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const Tiling& tiling = a.tiling;
  const int64_t channels = tiling.channels, bytes = (channels + 7) / 8;
  Scratch scratch(memory);
  A* values = scratch.take<A>(tiling.rows, kStretch);
  Multiplier<T> first(a.first, tiling.rows, scratch), second(a.second, tiling.rows, scratch);
  const bool as_it_is = sizeof(T) == sizeof(A) && a.start == nullptr && a.constant == nullptr && a.addend == nullptr &&
                        !a.joins && !a.stream;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / tiling.stretches * tiling.rows, n = min(tiling.rows, tiling.pixels - row);
    const int64_t from = task % tiling.stretches * kStretch, columns = min(kStretch, channels - from);
    const bool in_place = as_it_is && whole_panels<V>(columns) == columns;
    T* out = static_cast<T*>(a.out) + from;
    A* to = in_place ? static_cast<A*>(a.out) + row * channels + from : values;
    const int64_t to_row = in_place ? channels : scratch_row<A>(kStretch);
    for (int64_t p = 0; a.start != nullptr && p < n; ++p) {
      std::memcpy(to + p * to_row, static_cast<const A*>(a.start) + (row + p) * channels + from, columns * sizeof(A));
    }
    Ahead ahead;
    if (from == 0) {
      const int64_t bytes = n * channels * static_cast<int64_t>(sizeof(T));
      if (a.addend != nullptr && a.addend_sampling.down == 1 && a.addend_sampling.right == 1) {
        ahead.want(static_cast<const T*>(a.addend) + row * channels, bytes);
      }
      if (!a.stream) ahead.want(static_cast<const T*>(a.out) + row * channels, bytes);
      const int64_t next = row + n, more = min(tiling.rows, tiling.pixels - next);
      if (first) want_rows<T>(ahead, a.first.left, next, more);
      if (second) want_rows<T>(ahead, a.second.left, next, more);
      ahead.spread(product_steps<V>(n, (first ? a.first : a.second).left.channels, columns));
    }
    if (first) first.run(row, n, from, columns, to, to_row, a.start != nullptr, ahead);
    if (second) second.run(row, n, from, columns, to, to_row, a.start != nullptr || first, ahead);
    if (!in_place) {
      const A* constant = a.constant == nullptr ? nullptr : static_cast<const A*>(a.constant) + from;
      Row<T> results(out, columns, a.stream, channels);
      for (int64_t p = 0; p < n; ++p, to += to_row) {
        if (a.joins) {
          T* joined = out + source_row(a.out_sampling, row + p) * channels;
          for_channels<V::width>(columns, [&](int64_t c, auto lanes) {
            V v = load<V>(to + c, lanes);
            if (constant != nullptr) v = v - load<V>(constant + c, lanes);
            store(joined + c, load<V>(joined + c, lanes) + v, lanes);
          });
          continue;
        }
        T* result = results.begin(row + p);
        const int64_t added = a.addend == nullptr ? -1 : sampled_row(a.addend_sampling, row + p);
        if (added >= 0) {
          masked_add_row(columns, to, static_cast<const T*>(a.addend) + added * channels + from,
                         a.addend_signs == nullptr ? nullptr : a.addend_signs + added * bytes + from / 8, result);
        } else {
          for_channels<V::width>(columns, [&](int64_t c, auto lanes) {
            V v = load<V>(to + c, lanes);
            if (constant != nullptr) v = v - load<V>(constant + c, lanes);
            store(result + c, v, lanes);
          });
        }
        results.end(row + p);
      }
    }
    if (a.statistics.partials != nullptr) bn_stats<T>(a.statistics, task, task + 1);
    if (a.sums.partials != nullptr) bn_act_backward_reduce<T>(a.sums, task, task + 1);
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
