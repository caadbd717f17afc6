// The two launches of a meta-step: one block, or cluster of blocks, takes one task after the other,
// then the sums over tasks. Included by a generated source after its tables.
#pragma once

#include "meta_step.h"

namespace fm::cuda {

// Tasks are cut into this many contiguous ranges at most, each summed in order, and then the
// ranges: so the sums depend on the number of tasks alone.
constexpr int RANGES = 16;
constexpr int SUM_COLUMNS = 32;  // of a block of sums

struct SumArgs {
  i64 tasks, columns;
  const S* partial;  // [tasks, columns]
  S* total;          // [columns]
};

}  // namespace fm::cuda

FM_KERNEL(fm::cuda::LAYOUT.threads) FM_CLUSTERS fastmeta_meta_step(FM_ARGUMENT(fm::cuda::Args) args) {
  using namespace fm::cuda;
  begin();
  S* const workspace = args.workspace + fm::i64(block()) * RANKS * LAYOUT.slab;
  for (fm::i64 t = block(); t < args.tasks; t += blocks()) {
    MetaStep task(args, workspace, t);
    fm::meta_step(task);
  }
  end();
}

FM_KERNEL(fm::cuda::RANGES* fm::cuda::SUM_COLUMNS) fastmeta_sum(FM_ARGUMENT(fm::cuda::SumArgs) args) {
  using namespace fm::cuda;
  S* const sums = static_cast<S*>(alone::shared_memory());  // [RANGES, SUM_COLUMNS]
  const fm::i64 ranges = args.tasks < RANGES ? args.tasks : RANGES;
  for (int item = alone::thread(); item < RANGES * SUM_COLUMNS; item += alone::threads()) {
    const fm::i64 range = item / SUM_COLUMNS,
                  column = fm::i64(alone::block()) * SUM_COLUMNS + item % SUM_COLUMNS;
    if (range >= ranges || column >= args.columns) continue;
    S sum = 0;
    FM_UNROLL_BY(8)
    for (fm::i64 t = args.tasks * range / ranges; t < args.tasks * (range + 1) / ranges; ++t)
      sum += args.partial[t * args.columns + column];
    sums[item] = sum;
  }
  alone::barrier();
  for (int c = alone::thread(); c < SUM_COLUMNS; c += alone::threads()) {
    const fm::i64 column = fm::i64(alone::block()) * SUM_COLUMNS + c;
    if (column >= args.columns) continue;
    S total = 0;
    for (int r = 0; r < ranges; ++r) total += sums[r * SUM_COLUMNS + c];
    args.total[column] = total;
  }
}
