// group_norm: each example normalised over groups of channels.
#pragma once

#include "../families/norm.h"

namespace fm::cuda::group_norm {

template <int L>
struct Groups {
  static constexpr int IN = LAYERS[L].inputs[0], ROWS = VALUES[IN].rows, COLS = VALUES[IN].cols;
  static constexpr bool CHANNELS = false;
  static constexpr double EPSILON = LAYERS[L].constants[1];
  static constexpr int EACH = int(LAYERS[L].constants[0]),
                       WIDTH = COLS / EACH;  // groups of an example, channels of a group
  static constexpr int COUNT = usual_rows(IN) / ROWS * EACH, SIZE = ROWS * WIDTH;
  static FM_INLINE int count(const Pass& pass) { return pass.examples * EACH; }
  static FM_INLINE int size(const Pass&) { return SIZE; }
  static FM_INLINE int row(int g, int e) { return g / EACH * ROWS + e / WIDTH; }
  static FM_INLINE int column(int g, int e) { return g % EACH * WIDTH + e % WIDTH; }
  static FM_INLINE int param(int g, int e) { return column(g, e); }
  template <class Body>
  static FM_INLINE void each_use(const Pass& pass, int p, const Body& body) {
    for (int n = 0; n < pass.examples; ++n)
      for (int r = 0; r < ROWS; ++r) body(n * EACH + p / WIDTH, r * WIDTH + p % WIDTH);
  }
};
template <int L>
using Functions = Norm<Groups<L>, L>;

}  // namespace fm::cuda::group_norm
