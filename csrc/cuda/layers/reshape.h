// reshape: the same numbers in rows of another length, or an image turned between torch's order and
// channels-last.
#pragma once

#include "../families/moves.h"

namespace fm::cuda::reshape {

template <int L>
struct Map {
  static FM_INLINE bool from(int, int r, int c, int& row, int& column) {
    constexpr Value in = VALUES[LAYERS[L].inputs[0]], out = VALUES[LAYERS[L].output];
    const int example = r / out.rows, pixel = r % out.rows;
    const int element = out.channels ? c * out.rows + pixel : pixel * out.cols + c;
    row = example * in.rows + (in.channels ? element % in.rows : element / in.cols);
    column = in.channels ? element / in.rows : element % in.cols;
    return true;
  }
};
template <int L>
using Functions = Moves<Map<L>, L>;

}  // namespace fm::cuda::reshape
