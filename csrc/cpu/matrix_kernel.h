// Matrix products of blocks that fit the caches, all of them from one register tile.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// The register tile: kTileRows rows of `panel` columns. With the operands of one step it fills the vector registers.
constexpr int kTileRows = 6;

template <class V>
struct Tile {
#if defined(__AVX512F__)
  static constexpr int registers = 24, bytes = 64;
#elif defined(__AVX2__)
  static constexpr int registers = 12, bytes = 32;
#else
  static constexpr int registers = 12, bytes = 16;
#endif
  static constexpr int fit = registers * bytes / (kTileRows * static_cast<int>(sizeof(V)));
  static constexpr int vectors = fit > 0 ? fit : 1;
  static constexpr int panel = vectors * V::width;
  static_assert(kPanel % panel == 0);
};

// Depth that is multiplied at once: the panel stays in a cache, and sums of more products are sums of shorter ones.
constexpr int64_t kDepth = 128;

template <class V>
inline int64_t whole_panels(int64_t columns) {
  return (columns + Tile<V>::panel - 1) / Tile<V>::panel * Tile<V>::panel;
}

// Memory that is wanted soon. It is fetched bit by bit with the steps of products until then, so that neither waits for
// the other: the processor's own prefetchers lose the thread where products and passes over memory alternate.
class Ahead {
 public:
  void want(const void* from, int64_t bytes) {
    if (bytes <= 0 || count_ == most) return;
    parts_[count_++] = {static_cast<const char*>(from), bytes};
    bytes_ += bytes;
  }

  // How many steps there are until then.
  void spread(int64_t steps) { step_ = steps == 0 ? 0 : (bytes_ + steps - 1) / steps; }

  // Bytes between one step's address and the next one's.
  int64_t step() const { return at_ == count_ ? 0 : step_; }

  // The first address of the next `steps`.
  const char* take(int64_t steps) {
    if (at_ == count_) return nullptr;
    Part& part = parts_[at_];
    const char* from = part.from;
    part.from += steps * step_;
    part.bytes -= steps * step_;
    return from;
  }

  // After `take` and `step`.
  void next() {
    if (at_ < count_ && parts_[at_].bytes <= 0) ++at_;
  }

 private:
  static constexpr int most = 4;
  struct Part {
    const char* from;
    int64_t bytes;
  } parts_[most];
  int count_ = 0, at_ = 0;
  int64_t bytes_ = 0, step_ = 0;
};

// Steps of the register tile in a product of n rows.
template <class V>
inline int64_t product_steps(int64_t n, int64_t depth, int64_t columns) {
  return (n + kTileRows - 1) / kTileRows * (whole_panels<V>(columns) / Tile<V>::panel) * depth;
}

// c[i][j] = [c[i][j] +] sum over t < depth of a[i * a_row + t * a_step] * b[t * b_step + j], for `rows` times a panel.
template <class V, int rows, class A>
__attribute__((noinline)) void multiply_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b,
                                             int64_t b_step, A* c, int64_t c_row, bool add, const char* ahead,
                                             int64_t ahead_step) {
  constexpr int vectors = Tile<V>::vectors;
  V sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sums[i][j] = V::set(0);
  }
  for (int64_t t = 0; t < depth; ++t, a += a_step, b += b_step, ahead += ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    V right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = V::load(b + j * V::width);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V left = V::set(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      A* to = c + i * c_row + j * V::width;
      if (add) sums[i][j] = V::load(to) + sums[i][j];
      sums[i][j].store(to);
    }
  }
}

// The same for any number of rows up to a tile's.
template <class V, class A>
inline void multiply_rows(int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_step, const A* b,
                          int64_t b_step, A* c, int64_t c_row, bool add, Ahead& ahead) {
  using Function =
      void (*)(int64_t, const A*, int64_t, int64_t, const A*, int64_t, A*, int64_t, bool, const char*, int64_t);
  static constexpr Function functions[kTileRows] = {multiply_tile<V, 1, A>, multiply_tile<V, 2, A>,
                                                    multiply_tile<V, 3, A>, multiply_tile<V, 4, A>,
                                                    multiply_tile<V, 5, A>, multiply_tile<V, 6, A>};
  const char* from = ahead.take(depth);
  functions[rows - 1](depth, a, a_row, a_step, b, b_step, c, c_row, add, from, ahead.step());
  ahead.next();
}

// c[n, columns] = [c +] a[n, depth] * packed[depth, columns]. Columns come in whole panels. With `next`, the packed
// matrix after this one, they come from far away: each part of a panel is fetched while the one before it is
// multiplied.
template <class V, class A>
void multiply(int64_t n, int64_t depth, int64_t columns, const A* a, int64_t a_row, const A* packed, A* c,
              int64_t c_row, bool add, Ahead& ahead, const A* next = nullptr) {
  constexpr int64_t panel = Tile<V>::panel, line = 64 / sizeof(A);
  for (int64_t t = 0; t < depth; t += kDepth) {
    const int64_t more = min(kDepth, depth - t);
    for (int64_t j = 0; j < columns; j += panel) {
      const A* b = packed + j * depth + t * panel;
      const A* after = j + panel < columns ? b + panel * depth : t + more < depth ? packed + (t + more) * panel : next;
      int64_t lines = next == nullptr ? 0 : more * panel / line;
      for (int64_t i = 0; i < n; i += kTileRows) {
        Ahead part;
        if (lines > 0) {
          part.want(after, min(lines, more) * 64);
          part.spread(more);
          after += more * line;
          lines -= more;
        }
        multiply_rows<V>(min(kTileRows, n - i), more, a + i * a_row + t, a_row, 1, b, panel, c + i * c_row + j, c_row,
                         add || t > 0, part.step() > 0 ? part : ahead);
      }
    }
  }
}

// c[m, columns] += a[n, m]^T * b[n, columns]; if `upper`, where the column is no less than the row, and maybe
// elsewhere.
template <class V, class A>
void add_transposed_product(int64_t n, int64_t m, int64_t columns, const A* a, int64_t a_row, const A* b, int64_t b_row,
                            A* c, int64_t c_row, bool upper, Ahead& ahead) {
  constexpr int64_t panel = Tile<V>::panel;
  for (int64_t j = 0; j < columns; j += panel) {
    const int64_t last = upper ? min(m, j + panel) : m;
    for (int64_t i = 0; i < last; i += kTileRows) {
      multiply_rows<V>(min(kTileRows, last - i), n, a + i, 1, a_row, b + j, b_row, c + i * c_row + j, c_row, true,
                       ahead);
    }
  }
}

// One panel of n columns, of a matrix that is stored by columns. It goes a few rows at a time: those lines stay in the
// cache.
template <class V, class T, class A>
inline void pack_transposed(const T* from, int64_t depth, int64_t n, V sign, A* to) {
  constexpr int64_t panel = Tile<V>::panel, stretch = 128;
  for (int64_t t = 0; t < depth; t += stretch) {
    const int64_t rows = min(stretch, depth - t);
    for (int64_t j = 0; j < n; ++j) {
      for_channels<V::width>(rows, [&](int64_t i, auto lanes) {
        A piece[V::width];
        store(piece, load<V>(from + j * depth + t + i, lanes) * sign, lanes);
        for (int64_t k = 0; k < min(V::width, rows - i); ++k) to[(t + i + k) * panel + j] = piece[k];
      });
    }
  }
}

// A matrix [depth, columns] for `multiply`: panel after panel, each with its rows one after the other, in the dtype of
// the arithmetic, and 0 past the last column. Tasks are kPanel columns each.
template <class T>
void pack(const Pack& p, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  constexpr int64_t panel = Tile<V>::panel;
  const T* from = static_cast<const T*>(p.from);
  const V sign = V::set(p.negative ? -1 : 1);
  const int64_t columns = min(p.columns, end * kPanel);
  for (int64_t j = begin * kPanel; j < columns; j += panel) {
    A* to = static_cast<A*>(p.to) + j * p.depth;
    const int64_t n = min(panel, columns - j);
    if (n < panel) std::memset(to, 0, p.depth * panel * sizeof(A));
    if (p.transposed) {
      pack_transposed(from + j * p.depth, p.depth, n, sign, to);
      continue;
    }
    for (int64_t t = 0; t < p.depth; ++t) {
      for_channels<V::width>(n, [&](int64_t c, auto lanes) {
        store(to + t * panel + c, load<V>(from + t * p.columns + j + c, lanes) * sign, lanes);
      });
    }
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
