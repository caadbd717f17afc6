// rms_norm: the last dimensions of each example divided by the root of their mean square.
#pragma once

#include "../families/norm_by_row.h"

namespace fm::rms_norm {

// The number of values of a group, and epsilon; a weight.
constexpr Rules RULES = Rules(1).sizes(1).epsilon().with_params(1);

using Functions = NormByRow</*CENTRED=*/false>;

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  return Functions::needs(plan, layer, examples);
}

}  // namespace fm::rms_norm
