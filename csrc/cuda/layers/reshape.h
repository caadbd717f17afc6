// reshape: the same numbers in rows of another length.
#pragma once

#include "moves.h"

namespace fm::cuda::reshape {

template <int L>
struct Map {
  static FM_INLINE bool from(int, int r, int c, int& row, int& column) {
    constexpr int IN = VALUES[LAYERS[L].inputs[0]].cols, OUT = VALUES[LAYERS[L].output].cols;
    const int element = r * OUT + c;
    row = element / IN, column = element % IN;
    return true;
  }
};
FM_MOVES

}  // namespace fm::cuda::reshape
