// batch_norm: every channel normalised over the task's own batch, or by running statistics if they
// are given.
#pragma once

#include "../families/norm_by_channel.h"

namespace fm::batch_norm {

// weight and bias; running mean and variance
constexpr Rules RULES = Rules(1).epsilon().with_params(2).with_buffers(2).normalising_channels();

struct Groups {
  // One block of all rows, each channel for itself.
  static channel_norm::Blocks blocks(const Plan& plan, const Layer& layer, i64 examples) {
    return {1, examples * plan.values[layer.inputs[0]].rows, 1};
  }
  static double epsilon(const Layer& layer) { return layer.constants[0]; }
};
using Functions = NormByChannel<Groups>;

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  require((layer.params[2] < 0) == (layer.params[3] < 0), "running statistics are a mean and a variance");
  return Functions::needs(plan, layer, examples);
}

}  // namespace fm::batch_norm
