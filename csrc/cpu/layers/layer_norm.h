// layer_norm: the last dimensions of each example normalised together: groups of consecutive rows.
#pragma once

#include "../families/norm_by_row.h"

namespace fm::layer_norm {

// The number of values of a group, and epsilon; weight and bias.
constexpr Rules RULES = Rules(1).sizes(1).epsilon().with_params(2);

using Functions = NormByRow</*CENTRED=*/true>;

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  return Functions::needs(plan, layer, examples);
}

}  // namespace fm::layer_norm
