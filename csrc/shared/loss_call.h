// What a loss is computed from, and where its derivatives go: the same for every backend in C++.
#pragma once

#include "types.h"

namespace fm {

template <class S>
struct LossCall {
  LossSpec spec;
  i64 examples, rows, cols, ld;  // an example is `rows` rows of `cols` columns
  double scale;                  // of dz
  double side_scale;             // of dtarget and dweights
  const S* z;                    // [examples * rows, ld] network output
  // Whether z is channels-last: a row for each position, a column for each class or channel. It is
  // for cross-entropy of more than one position, and for any other loss of the same output. Targets
  // are then in torch's order, [cols, rows].
  bool channels;
  const void* target;  // i64 [examples, rows] or S [examples, rows * cols]
  const S* weights;    // [examples] or null
  const S*
      class_weights;  // [cols] or null (cross_entropy: class weights; bce: pos_weight, [rows] of channels)
  const S* rz;        // tangent of z (tangent pass only)
  S* dz;              // [examples * rows, ld] or null
  S* dtarget;         // [examples, rows * cols], added to, or null
  S* dweights;        // [examples], added to, or null
};

}  // namespace fm
