// An operand on its way from memory to a stage of shared memory, and the prologue that it goes through there.
#pragma once

#include "panel.cuh"
#include "sampling.cuh"

namespace fused_res::cuda {

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
/// on the channels, `piece` what depends on the line as well, so many lines and channels behind those that `line` was
/// asked for, both before the copies have arrived; `apply` computes. `on` is the same for all threads. kSums: it takes
/// sums on the way, and sees only lines that there are; else it may see lines past the depth as well, whose result is
/// not used. kRounds: what it makes of float32 is TF32, which the product need not round once more.
struct AsIs {
  static constexpr bool kActive = false, kSums = false, kRounds = false;
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
  /// Channels that stay the same; one that takes sums needs the registers.
  static constexpr bool kKeepsColumn = kMajor == Major::kExtent && Prologue::kActive && !Prologue::kSums;

  __device__ __forceinline__ Feed(const Lines<T>& lines, std::int64_t first, Range depth, const Prologue& prologue)
      : lines_(lines),
        prologue_(prologue),
        first_(first),
        depth_(depth),
        line_(static_cast<int>(threadIdx.x / Panel::kChunks)),
        chunk_(static_cast<int>(threadIdx.x % Panel::kChunks)),
        beyond_((kMajor == Major::kDepth ? static_cast<int>(depth.end) : lines.columns) - channel_of(0)),
        place_(static_cast<int>(Panel::place(line_, chunk_))) {
    if constexpr (kMajor == Major::kExtent) {
      last_ = static_cast<int>(depth.end - depth.begin) - 1 - line_;
      start_[0] = lines.data + (depth.begin + line_) * lines.columns + channel_of(0);
      row_bytes_ = lines.columns * static_cast<int>(sizeof(T));
      ptx::keep(last_);
      ptx::keep(start_[0]);
      ptx::keep(row_bytes_);
      if constexpr (kKeepsColumn) {
        if (prologue_.on()) column_ = prologue_.template column<kWide>(channel_of(0), valid_at(0));
      }
    }
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
    if constexpr (Prologue::kActive) {
#pragma unroll
      for (int i = 0; i < kWays; ++i) {
        way_[i] = prologue_.line(kMajor == Major::kDepth ? first + line_of(i) : depth.begin + line_, channel_of(0));
      }
    }
  }

  __device__ __forceinline__ void copy(Panel& panel, int step) const {
    const int valid = valid_at(step);
    const T* from[kPieces];
    starts(from, step);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool inside = is_there(i, step) && valid > 0;
      void* to = place(panel, i);
      if constexpr (kWide) {
        ptx::copy_async(to, from[i], inside);
      } else {
        const Pack value = load<T, false>(from[i], inside ? valid : 0);
        ptx::shared_store(to, make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
      }
    }
  }

  /// What the prologue needs beside the copies of a step.
  __device__ __forceinline__ void fetch(int step) {
    if constexpr (Prologue::kActive) {
      if (!prologue_.on()) return;
      const int valid = valid_at(step);
      if constexpr (!kKeepsColumn) column_ = prologue_.template column<kWide>(channel_of(step), valid);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int channels = kMajor == Major::kDepth ? step * kDepth : 0;
        piece_[i] = prologue_.piece(way_[i % kWays], further(i, step), channels, is_there(i, step) ? valid : 0);
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

  /// Of a step's lines, how far the thread's i-th one is behind its first one of all.
  __device__ __forceinline__ int further(int i, int step) const {
    return kMajor == Major::kDepth ? 0 : step * kDepth + i * kDown;
  }

  __device__ __forceinline__ bool is_there(int i, int step) const {
    return kMajor == Major::kDepth || further(i, step) <= last_;
  }

  /// Where the thread's chunks come from; anywhere, where nothing is read.
  __device__ __forceinline__ void starts(const T* (&from)[kPieces], int step) const {
    if constexpr (kMajor == Major::kDepth) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) from[i] = start_[i] + step * kDepth;
    } else if (lines_.sampled) {
      // Of the threads that copy chunks of one line each works out the way of another piece.
      static_assert(32 % Panel::kChunks == 0 && Panel::kChunks % kPieces == 0);
      const std::int64_t own = lines_.at(depth_.begin + line_ + further(chunk_ % kPieces, step)) - lines_.data;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const unsigned neighbour = threadIdx.x % 32 / Panel::kChunks * Panel::kChunks + i;
        from[i] = lines_.data + __shfl_sync(~0u, own, neighbour) + channel_of(0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const std::uint64_t bytes =
            std::uint64_t{static_cast<unsigned>(further(i, step))} * static_cast<unsigned>(row_bytes_);
        from[i] = reinterpret_cast<const T*>(reinterpret_cast<const char*>(start_[0]) + bytes);
      }
    }
  }

  struct Nothing {};
  template <class P, bool kActive>
  struct State {
    using Column = Nothing;
    using Piece = Nothing;
    using Way = Nothing;
  };
  template <class P>
  struct State<P, true> {
    using Column = typename P::Column;
    using Piece = typename P::Piece;
    using Way = typename P::Way;
  };

  const Lines<T>& lines_;
  const Prologue& prologue_;
  std::int64_t first_;
  Range depth_;
  int line_, chunk_;
  int beyond_;     // channels from the thread's first one on
  int place_;      // of the thread's first chunk
  int last_ = 0;   // of the panel's lines; over the depth, of those from the thread's first one on
  int row_bytes_;  // of memory
  /// Of every piece, or of the first line.
  static constexpr int kWays = kMajor == Major::kDepth ? kPieces : 1;
  const T* start_[kWays];
  typename State<Prologue, Prologue::kActive>::Way way_[kWays];
  typename State<Prologue, Prologue::kActive>::Column column_;
  typename State<Prologue, Prologue::kActive>::Piece piece_[kPieces];
};

}  // namespace fused_res::cuda
