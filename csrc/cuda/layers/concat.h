// concat: two values side by side in every row, or block of rows by block of rows. Its constant
// says in how many pairs of blocks of rows the values alternate; 0: their columns lie side by side.
#pragma once

#include "../families/moves.h"

namespace fm::cuda::concat {

template <int L>
struct Map {
  static FM_INLINE bool from(int j, int r, int c, int& row, int& column) {
    constexpr Layer layer = LAYERS[L];
    constexpr Value a = VALUES[layer.inputs[0]], b = VALUES[layer.inputs[1]], y = VALUES[layer.output];
    constexpr int outer = int(layer.constants[0]), blocks = outer > 0 ? outer : 1;
    if constexpr (outer == 0) {
      row = r, column = j == 0 ? c : c - a.cols;
      return (c < a.cols) == (j == 0);
    } else {
      constexpr int all = y.rows / blocks, first = a.rows / blocks, second = b.rows / blocks;
      const int block = r / all, within = r % all;
      row = j == 0 ? block * first + within : block * second + within - first, column = c;
      return (within < first) == (j == 0);
    }
  }
};
template <int L>
using Functions = Moves<Map<L>, L>;

}  // namespace fm::cuda::concat
