// The core of the kernels that multiply: a tile of the product of two matrices, from memory to registers.
//
// Copies run several stages ahead of the products. What a prologue computes of an operand, it computes once for each
// element, in shared memory, by the thread that has copied it. What becomes of the result, an epilogue takes in groups
// of 16 bytes that lie in memory as they are to be stored.
#pragma once

#include "launch.cuh"
#include "merge.cuh"
#include "panel.cuh"
#include "sampling.cuh"

namespace fused_res::cuda {

/// The work of a block: rows x columns of a result, in steps of kDepthBytes of each line; stages of copies; how its
/// warps share it. A warp has 64 columns.
template <int kRows_, int kColumns_, int kDepthBytes_, int kStages_, int kWarpsDown_>
struct Tiling {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_, kDepthBytes = kDepthBytes_;
  static constexpr int kWarpsDown = kWarpsDown_, kWarpColumns = 64, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarps = kWarpsDown * kWarpsAcross, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = kRows / kWarpsDown;
  static constexpr int kTilesDown = kWarpRows / 16, kTilesAcross = kWarpColumns / 8;
  /// Of a multiprocessor at once: 16 warps of 128 registers a thread, or of 64 results 12 warps of 168, or of 128 8.
  static constexpr int kBlocks = (kTilesDown == 1 ? 512 : kTilesDown == 2 ? 384 : 256) / kThreads;
  static_assert(kColumns % kWarpColumns == 0 && kWarpRows % 16 == 0 && kStages >= 2);

  /// The first row and column of the thread's warp.
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x / 32 / kWarpsAcross) * kWarpRows;
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x / 32 % kWarpsAcross) * kWarpColumns;
  }
};

/// A matrix in memory, of `count` lines; of images at a stride, the sampled pixels are its lines, fewer than 2^31.
template <class T>
struct Lines {
  const T* data;
  std::int64_t count;
  int columns;
  bool sampled;
  Sampling sampling;

  __device__ __forceinline__ const T* at(std::int64_t line) const {
    return data + (sampled ? sampled_row(sampling, static_cast<unsigned>(line)) : line) * columns;
  }
};

/// The part of the depth that is summed over: elements of lines for Major::kDepth, lines for Major::kExtent.
struct Range {
  std::int64_t begin, end;
};

/// The prologue of an operand that is multiplied as it lies in memory.
///
/// A prologue sees groups of 16 bytes as they lie in memory: of a line, from a channel on. `column` loads what depends
/// on the channels, `piece` what depends on the line as well, both before the copies have arrived; `apply` computes.
/// `on` is the same for all threads. kSums: it takes sums on the way, sees only lines that there are, and makes 0 of 0
/// past the depth; else it may see lines past the depth as well, whose result is not used.
struct AsIs {
  static constexpr bool kActive = false;
};

/// One operand on its way: a thread copies the same chunk of every kDown-th line.
///
/// Lines past the last one of an extent make rows or columns of the result that nobody looks at: they are copies of the
/// last one. Past the depth everything is 0.
template <class T, class Panel, Major kMajor, int kThreads, bool kWide, class Prologue>
class Feed {
 public:
  static constexpr int kDown = kThreads / Panel::kChunks, kPieces = Panel::kLines / kDown;
  static constexpr int kDepth = kMajor == Major::kDepth ? Panel::kChunks * kGroup<T> : Panel::kLines;
  static_assert(kThreads % Panel::kChunks == 0 && Panel::kLines % kDown == 0);

  __device__ __forceinline__ Feed(const Lines<T>& lines, std::int64_t first, Range depth, const Prologue& prologue)
      : lines_(lines),
        prologue_(prologue),
        first_(first),
        depth_(depth),
        line_(static_cast<int>(threadIdx.x / Panel::kChunks)),
        chunk_(static_cast<int>(threadIdx.x % Panel::kChunks)),
        beyond_((kMajor == Major::kDepth ? static_cast<int>(depth.end) : lines.columns) - channel_of(0)),
        place_(static_cast<int>(Panel::place(line_, chunk_))) {
    if constexpr (kMajor == Major::kDepth) {
      ptx::keep(beyond_);
      ptx::keep(place_);
      last_ = static_cast<int>(lines.count - first < Panel::kLines ? lines.count - first : Panel::kLines) - 1;
      const T* from = lines.data + first * lines.columns + channel_of(0);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) start_[i] = from + line_of(i) * lines.columns;
      if (lines.sampled) {
        // Of the lines of a few neighbours each works out one.
        static_assert(32 % Panel::kChunks == 0 && Panel::kChunks % kPieces == 0);
        const std::int64_t own = lines.at(first + line_of(chunk_ % kPieces)) - lines.data;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const unsigned neighbour = threadIdx.x % 32 / Panel::kChunks * Panel::kChunks + i;
          start_[i] = lines.data + __shfl_sync(~0u, own, neighbour) + channel_of(0);
        }
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) ptx::keep(start_[i]);
    }
  }

  __device__ __forceinline__ void copy(Panel& panel, int step) const {
    const int channel = channel_of(step), valid = valid_at(step);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool inside = is_there(i, step) && valid > 0;
      const T* from = start(i, step, inside, channel);
      void* to = place(panel, i);
      if constexpr (kWide) {
        ptx::copy_async(to, from, inside);
      } else {
        const Pack value = load<T, false>(from, inside ? valid : 0);
        ptx::shared_store(to, make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
      }
    }
  }

  /// What the prologue needs beside the copies of a step.
  __device__ __forceinline__ void fetch(int step) {
    if constexpr (Prologue::kActive) {
      if (!prologue_.on()) return;
      const int channel = channel_of(step), valid = valid_at(step);
      column_ = prologue_.template column<kWide>(channel, valid);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        piece_[i] = prologue_.piece(line_number(i, step), channel, is_there(i, step) ? valid : 0);
      }
    }
  }

  /// The prologue, once the thread's own copies have arrived.
  __device__ __forceinline__ void apply(Panel& panel, int step) const {
    if constexpr (Prologue::kActive) {
      if (!prologue_.on()) return;
      const bool inside = valid_at(step) > 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (Prologue::kSums && !is_there(i, step)) continue;
        void* at = place(panel, i);
        const uint4 v = ptx::shared_load<uint4>(at);
        const Pack value = prologue_.apply(column_, piece_[i], Pack{{v.x, v.y, v.z, v.w}});
        if (Prologue::kSums || (inside && is_there(i, step))) {
          ptx::shared_store(at, make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
        }
      }
    }
  }

 private:
  /// Where the thread's i-th chunk is.
  __device__ __forceinline__ void* place(Panel& panel, int i) const {
    if constexpr (kMajor == Major::kDepth) {
      static_assert(kDown % 8 == 0);
      return panel.word + 4 * place_ + 4 * i * kDown * Panel::kChunks;
    }
    return panel.at(line_ + i * kDown, chunk_);
  }

  __device__ __forceinline__ int channel_of(int step) const {
    const int start = static_cast<int>(kMajor == Major::kDepth ? depth_.begin : first_);
    return start + chunk_ * kGroup<T> + (kMajor == Major::kDepth ? step * kDepth : 0);
  }

  /// Of the group of a step, the channels that there are.
  __device__ __forceinline__ int valid_at(int step) const {
    const int left = kMajor == Major::kDepth ? beyond_ - step * kDepth : lines_.columns - channel_of(0);
    return left <= 0 ? 0 : left < kGroup<T> ? left : kGroup<T>;
  }

  /// Of the panel's lines, the thread's i-th one; in place of one past the last the last one.
  __device__ __forceinline__ int line_of(int i) const {
    const int line = line_ + i * kDown;
    return line < last_ ? line : last_;
  }

  __device__ __forceinline__ std::int64_t line_number(int i, int step) const {
    if constexpr (kMajor == Major::kDepth) return first_ + line_of(i);
    return depth_.begin + std::int64_t{step} * kDepth + line_ + i * kDown;
  }

  __device__ __forceinline__ bool is_there(int i, int step) const {
    if constexpr (kMajor == Major::kDepth) return true;
    return line_number(i, step) < depth_.end;
  }

  /// Where the thread's i-th chunk comes from, or any place where nothing is read.
  __device__ __forceinline__ const T* start(int i, int step, bool inside, int channel) const {
    if constexpr (kMajor == Major::kDepth) return start_[i] + step * kDepth;
    return inside ? lines_.at(line_number(i, step)) + channel : lines_.data;
  }

  struct Nothing {};
  template <class P, bool kActive>
  struct State {
    using Column = Nothing;
    using Piece = Nothing;
  };
  template <class P>
  struct State<P, true> {
    using Column = typename P::Column;
    using Piece = typename P::Piece;
  };

  const Lines<T>& lines_;
  const Prologue& prologue_;
  std::int64_t first_;
  Range depth_;
  int line_, chunk_;
  int beyond_;    // channels from the thread's first one on
  int place_;     // of the thread's first chunk
  int last_ = 0;  // of the panel's lines
  const T* start_[kMajor == Major::kDepth ? kPieces : 1];
  typename State<Prologue, Prologue::kActive>::Column column_;
  typename State<Prologue, Prologue::kActive>::Piece piece_[kPieces];
};

/// A warp's part of the result, in the words of `multiply`.
template <class Tiling>
struct Accumulators {
  float value[Tiling::kTilesDown][Tiling::kTilesAcross][4] = {};
};

/// Goes through steps whose copies are under way kStages - 1 steps before: copy(stage, step) begins them, fetch(step)
/// loads what else the step needs, arrive(stage, step) sees what the thread itself has copied, and use(stage, step)
/// what all have; at least one step. All threads must come here. What was in the memory before must have been read;
/// afterwards it has been.
template <int kStages, class Stage, class Copy, class Fetch, class Arrive, class Use>
__device__ __forceinline__ void pipelined(Stage (&stages)[kStages], int steps, Copy copy, Fetch fetch, Arrive arrive,
                                          Use use) {
  constexpr int kAhead = kStages - 1;
  copy(stages[0], 0);
  ptx::commit_copies();
#pragma unroll
  for (int ahead = 1; ahead < kAhead; ++ahead) {
    if (ahead < steps) copy(stages[ahead], ahead);
    ptx::commit_copies();
  }
  int read = 0, write = kAhead, step = 0;
#pragma unroll 1
  do {
    fetch(step);
    ptx::wait_copies<kAhead - 1>();
    arrive(stages[read], step);
    // Now all of this stage is there, and all have read the one that the next copies overwrite.
    __syncthreads();
    if (step + kAhead < steps) copy(stages[write], step + kAhead);
    ptx::commit_copies();
    use(stages[read], step);
    read = read + 1 == kStages ? 0 : read + 1;
    write = write + 1 == kStages ? 0 : write + 1;
  } while (++step < steps);
  // The groups that are left are empty.
  __syncthreads();
}

/// Nothing that is done with a stage beside the product.
struct NothingBeside {
  template <class Stage>
  __device__ __forceinline__ void operator()(const Stage&, int) const {}
};

/// first x second, each in memory as its Major says. kWide: both can be copied in 16 bytes.
template <class T, class Tiling, Major kFirst, Major kSecond, bool kWide>
struct Product {
  static constexpr int kDepth = Tiling::kDepthBytes / static_cast<int>(sizeof(T));
  using First = Panel<T, Tiling::kRows, kDepth, kFirst>;
  using Second = Panel<T, Tiling::kColumns, kDepth, kSecond>;

  struct Stage {
    First first;
    Second second;
  };
  struct Memory {
    Stage stage[Tiling::kStages];
  };

  /// Adds the product to `sum`, of rows from `row` of the first operand on and of columns from `column` of the second
  /// on; beside(stage, step) sees every stage, too. Threads and memory as for `pipelined`.
  template <class FirstPrologue, class SecondPrologue, class Beside = NothingBeside>
  static __device__ __forceinline__ void add(Accumulators<Tiling>& sum, Memory& memory, const Lines<T>& first,
                                             std::int64_t row, const FirstPrologue& first_prologue,
                                             const Lines<T>& second, std::int64_t column,
                                             const SecondPrologue& second_prologue, Range depth, Beside beside = {}) {
    Feed<T, First, kFirst, Tiling::kThreads, kWide, FirstPrologue> a(first, row, depth, first_prologue);
    Feed<T, Second, kSecond, Tiling::kThreads, kWide, SecondPrologue> b(second, column, depth, second_prologue);
    int first_place = First::first_place(Tiling::warp_row()),
        second_place = Second::second_place(Tiling::warp_column());
    ptx::keep(first_place);
    ptx::keep(second_place);
    pipelined(
        memory.stage, static_cast<int>((depth.end - depth.begin + kDepth - 1) / kDepth),
        [&](Stage& stage, int step) {
          a.copy(stage.first, step);
          b.copy(stage.second, step);
        },
        [&](int step) {
          a.fetch(step);
          b.fetch(step);
        },
        [&](Stage& stage, int step) {
          a.apply(stage.first, step);
          b.apply(stage.second, step);
        },
        [&](const Stage& stage, int step) {
          multiply(sum, stage, first_place, second_place);
          beside(stage, step);
        });
  }

 private:
  /// The places are used of factors that are kDepth.
  static __device__ __forceinline__ void multiply(Accumulators<Tiling>& sum, const Stage& stage, int first_place,
                                                  int second_place) {
    const int row = Tiling::warp_row(), column = Tiling::warp_column();
#pragma unroll
    for (int step = 0; step < kDepth / (2 * kGroup<T>); ++step) {
      std::uint32_t a[Tiling::kTilesDown][4];
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
        if constexpr (kFirst == Major::kDepth) {
          stage.first.load(a[i], first_place, 16 * i, step);
        } else {
          stage.first.load_first(a[i], row + 16 * i, step);
        }
        as_multiplied(a[i]);
      }
#pragma unroll
      for (int j = 0; j < Tiling::kTilesAcross; j += 2) {
        std::uint32_t b[4];
        if constexpr (kSecond == Major::kDepth) {
          stage.second.load(b, second_place, 8 * j, step);
        } else {
          stage.second.load_second(b, column + 8 * j, step);
        }
        as_multiplied(b);
#pragma unroll
        for (int i = 0; i < Tiling::kTilesDown; ++i) {
          ptx::multiply<T>(sum.value[i][j], a[i], b[0], b[1]);
          ptx::multiply<T>(sum.value[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  static __device__ __forceinline__ void as_multiplied(std::uint32_t (&words)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (std::uint32_t& word : words) word = ptx::to_tf32(word);
    }
  }
};

/// A row of a block's tile: the lane's first, and how many further down, which is a constant once loops are unrolled.
struct TileRow {
  int first, down;

  __device__ __forceinline__ operator int() const { return first + down; }
};

/// The way of a result from registers to memory: a warp hands 16 rows of it at a time to its lanes, in groups of 16
/// bytes of the format T that it is stored in. A lane's groups all begin at the same column.
template <class T, class Tiling>
struct Groups {
  static constexpr int kCount = kGroup<T>, kAcross = Tiling::kWarpColumns / kCount, kDown = 32 / kAcross;
  /// Of 4 rows lanes write 8 columns at once, and of 8 columns each they read chunks that a pair of them has swapped.
  static constexpr int kPitch = Tiling::kWarpColumns + 8;

  struct Memory {
    alignas(16) float value[Tiling::kWarps][16 * kPitch];
  };

  /// The lane's column in the block's tile.
  static __device__ __forceinline__ int column() {
    return Tiling::warp_column() + static_cast<int>(threadIdx.x % kAcross) * kCount;
  }

  /// The lane's first row in the block's tile.
  static __device__ __forceinline__ int row() {
    return Tiling::warp_row() + static_cast<int>(threadIdx.x % 32 / kAcross);
  }

  /// Calls `finish(row in the block's tile, values, fetched)` in all lanes, with what `fetch(row)` has returned
  /// earlier: for several rows at once, so that their loads are on their way together.
  template <class Fetch, class Finish>
  static __device__ __forceinline__ void each(const Accumulators<Tiling>& sum, Memory& memory, Fetch fetch,
                                              Finish finish) {
    using Fetched = decltype(fetch(TileRow{}));
    constexpr int kPasses = 16 / kDown, kAtOnce = 4;
    const unsigned lane = threadIdx.x % 32;
    float* slab = memory.value[threadIdx.x / 32];
    // Columns 32 and more lie in swapped chunks; what is written and read is constants away from these.
    float* to[2] = {slab + place(lane / 4, lane % 4 * 2, 0), slab + place(lane / 4, lane % 4 * 2, 1)};
    const unsigned across = lane % kAcross * kCount, swapped = across / 32 % 2;
    const float* from[2] = {slab + place(lane / kAcross, across, swapped),
                            slab + place(lane / kAcross, across + 4, swapped)};
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
      Fetched fetched[kAtOnce];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) fetched[p] = fetch(TileRow{row(), 16 * i + p * kDown});
      // What was there has been read.
      __syncwarp();
#pragma unroll
      for (int j = 0; j < Tiling::kTilesAcross; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto& v = sum.value[i][j];
          ptx::shared_store(to[j / 4 % 2] + 8 * h * kPitch + 8 * j, make_float2(v[2 * h], v[2 * h + 1]));
        }
      }
      __syncwarp();
#pragma unroll
      for (int batch = 0; batch < kPasses; batch += kAtOnce) {
        if (batch > 0) {
#pragma unroll
          for (int p = 0; p < kAtOnce; ++p) fetched[p] = fetch(TileRow{row(), 16 * i + (batch + p) * kDown});
        }
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          const int down = (batch + p) * kDown;
          float value[kCount];
#pragma unroll
          for (int q = 0; q < kCount / 4; ++q) {
            const uint4 v = ptx::shared_load<uint4>(from[q] + down * kPitch);
            value[4 * q] = __uint_as_float(v.x);
            value[4 * q + 1] = __uint_as_float(v.y);
            value[4 * q + 2] = __uint_as_float(v.z);
            value[4 * q + 3] = __uint_as_float(v.w);
          }
          finish(TileRow{row(), 16 * i + down}, value, fetched[p]);
        }
      }
    }
  }

  /// The same of values rounded to T, without anything fetched: `finish(row, their group)`.
  template <class Finish>
  static __device__ __forceinline__ void each_rounded(const Accumulators<Tiling>& sum, Memory& memory, Finish finish) {
    if constexpr (sizeof(T) == 4) {
      each(
          sum, memory, [](TileRow) { return 0; },
          [&](TileRow row, const float (&value)[kCount], int) { finish(row, pack<T>(value)); });
    } else {
      // Of 8 rows lanes write 4 words at once; 8 lanes read a row.
      constexpr int kPitch = Tiling::kWarpColumns / 2 + 4;
      const unsigned lane = threadIdx.x % 32;
      float* slab = memory.value[threadIdx.x / 32];
      float* to = slab + lane / 4 * kPitch + lane % 4;
      const float* from = slab + lane / kAcross * kPitch + lane % kAcross * 4;
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
        // What was there has been read.
        __syncwarp();
#pragma unroll
        for (int j = 0; j < Tiling::kTilesAcross; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto& v = sum.value[i][j];
            ptx::shared_store(to + 8 * h * kPitch + 4 * j, narrow_pair<T>(v[2 * h], v[2 * h + 1]));
          }
        }
        __syncwarp();
#pragma unroll
        for (int down = 0; down < 16; down += kDown) {
          const uint4 v = ptx::shared_load<uint4>(from + down * kPitch);
          finish(TileRow{row(), 16 * i + down}, Pack{{v.x, v.y, v.z, v.w}});
        }
      }
    }
  }

 private:
  /// swapped: whether it is of columns 32 to 63 of each 64.
  static __device__ __forceinline__ unsigned place(unsigned row, unsigned column, unsigned swapped) {
    return row * kPitch + (column / 4 ^ swapped) * 4 + column % 4;
  }
};

}  // namespace fused_res::cuda
