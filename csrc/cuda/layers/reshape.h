// reshape: the same numbers in rows of another length, or an image turned between torch's order and
// channels-last.
#pragma once

#include "moves.h"

namespace fm::cuda::reshape {

// c0, c1: whether the input and the output are channels-last.
template <int L>
struct Map {
  static FM_INLINE bool from(int, int r, int c, int& row, int& column) {
    constexpr Value in = VALUES[LAYERS[L].inputs[0]], out = VALUES[LAYERS[L].output];
    const int example = r / out.rows, pixel = r % out.rows;
    const int element = LAYERS[L].c1 != 0 ? c * out.rows + pixel : pixel * out.cols + c;
    row = example * in.rows + (LAYERS[L].c0 != 0 ? element % in.rows : element / in.cols);
    column = LAYERS[L].c0 != 0 ? element / in.rows : element % in.cols;
    return true;
  }
};
FM_MOVES

}  // namespace fm::cuda::reshape
