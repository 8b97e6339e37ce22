// The core of the kernels that multiply: a tile of the product of two matrices, from memory to registers.
//
// Copies run several stages ahead of the products. What a prologue computes of an operand, it computes once for each
// element, in shared memory, by the thread that has copied it. What becomes of the result, an epilogue takes in groups
// of 16 bytes that lie in memory as they are to be stored.
#pragma once

#include "feed.cuh"
#include "groups.cuh"
#include "merge.cuh"

namespace fused_res::cuda {

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
          multiply<FirstPrologue::kRounds, SecondPrologue::kRounds>(sum, stage, first_place, second_place);
          beside(stage, step);
        });
  }

 private:
  /// Whether the first and the second factor are rounded already.
  template <bool kFirstRounded, bool kSecondRounded>
  static __device__ __forceinline__ void multiply(Accumulators<Tiling>& sum, const Stage& stage, int first_place,
                                                  int second_place) {
#pragma unroll
    for (int step = 0; step < kDepth / (2 * kGroup<T>); ++step) {
      std::uint32_t a[Tiling::kTilesDown][4];
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
        stage.first.load_first(a[i], first_place, 16 * i, step);
        if constexpr (!kFirstRounded) as_multiplied(a[i]);
      }
#pragma unroll
      for (int j = 0; j < Tiling::kTilesAcross; j += 2) {
        std::uint32_t b[4];
        stage.second.load_second(b, second_place, 8 * j, step);
        if constexpr (!kSecondRounded) as_multiplied(b);
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

}  // namespace fused_res::cuda
