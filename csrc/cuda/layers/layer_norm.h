// layer_norm: the last dimensions of each example normalised together: groups of consecutive rows.
#pragma once

#include "../families/norm.h"

namespace fm::cuda::layer_norm {

template <int L>
struct Groups {
  static constexpr int IN = LAYERS[L].inputs[0], COLS = VALUES[IN].cols;
  static constexpr bool CHANNELS = false;
  static constexpr double EPSILON = LAYERS[L].constants[1];
  static constexpr int SIZE = int(LAYERS[L].constants[0]), HEIGHT = SIZE / COLS,
                       COUNT = usual_rows(IN) / HEIGHT;
  static FM_INLINE int count(const Pass& pass) { return rows(pass, IN) / HEIGHT; }
  static FM_INLINE int size(const Pass&) { return SIZE; }
  static FM_INLINE int row(int g, int e) { return g * HEIGHT + e / COLS; }
  static FM_INLINE int column(int, int e) { return e % COLS; }
  static FM_INLINE int param(int, int e) { return e; }
  template <class Body>
  static FM_INLINE void each_use(const Pass& pass, int p, const Body& body) {
    for (int g = 0; g < count(pass); ++g) body(g, p);
  }
};
template <int L>
using Functions = Norm<Groups<L>, L>;

}  // namespace fm::cuda::layer_norm
