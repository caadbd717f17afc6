// group_norm: each example normalised over groups of channels; instance norm is one channel a
// group.
#pragma once

#include "../families/norm_by_channel.h"

namespace fm::group_norm {

// The number of groups, and epsilon; weight and bias.
constexpr Rules RULES = Rules(1).sizes(1).epsilon().with_params(2).normalising_channels();

struct Groups {
  // A block for each example.
  static channel_norm::Blocks blocks(const Plan& plan, const Layer& layer, i64 examples) {
    const Value& x = plan.values[layer.inputs[0]];
    return {examples, x.rows, x.cols / i64(layer.constants[0])};
  }
  static double epsilon(const Layer& layer) { return layer.constants[1]; }
};
using Functions = NormByChannel<Groups>;

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  const i64 channels = plan.values[layer.output].cols, groups = i64(layer.constants[0]);
  require(groups > 0 && channels % groups == 0, "a group norm's groups do not divide its channels");
  return Functions::needs(plan, layer, examples);
}

}  // namespace fm::group_norm
