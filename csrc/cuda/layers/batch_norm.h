// batch_norm: every channel normalised over the task's own batch, or by running statistics.
#pragma once

#include "../families/norm.h"

namespace fm::cuda::batch_norm {

template <int L>
struct Groups {
  static constexpr int IN = LAYERS[L].inputs[0];
  static constexpr bool CHANNELS = true;
  static constexpr double EPSILON = LAYERS[L].constants[0];
  static constexpr int COUNT = VALUES[IN].cols, SIZE = usual_rows(IN);
  static FM_INLINE int count(const Pass&) { return COUNT; }
  static FM_INLINE int size(const Pass& pass) { return rows(pass, IN); }
  static FM_INLINE int row(int, int e) { return e; }
  static FM_INLINE int column(int g, int) { return g; }
  static FM_INLINE int param(int g, int) { return g; }
};
template <int L>
using Functions = Norm<Groups<L>, L>;

}  // namespace fm::cuda::batch_norm
