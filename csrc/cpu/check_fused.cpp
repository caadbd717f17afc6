// What the graph passes in Python have decided, checked before anything runs: a wrong decision must
// not make the engine read beside a value.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace fm {
namespace {

void require(bool ok, size_t layer, const char* field, const char* what) {
  if (!ok)
    throw std::invalid_argument("Plan: layers[" + std::to_string(layer) + "].fused." + field + " " + what);
}

bool channel_norm(const Layer& layer) { return rules(layer.kind).by_channel; }

int readers(const Plan& plan, int value) {
  int count = value == plan.output;
  for (const Layer& layer : plan.layers) count += int(std::count(layer.inputs, layer.inputs + 2, value));
  return count;
}

void check_pool(const Plan& plan, size_t i, const Layer& layer) {
  if (layer.pool_h == 0 && layer.pool_w == 0) return;
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(channel_norm(layer) && x.channels && y.channels, i, "pool", "is for norms of images");
  require(layer.pool_h > 0 && layer.pool_w > 0 && layer.pool_h <= x.height && layer.pool_w <= x.width, i,
          "pool", "must be windows inside of the image");
  require(y.height == x.height / layer.pool_h && y.width == x.width / layer.pool_w, i, "pool",
          "does not make an image of the output's size");
}

void check_recomputed(const Plan& plan, size_t i, const Layer& norm) {
  if (norm.recomputes < 0) return;
  const auto must = [&](bool ok, const char* what) { require(ok, i, "recomputes", what); };
  must(channel_norm(norm), "is for norms of images");
  must(norm.recomputes < int(i), "must be an earlier layer");
  const Layer& conv = plan.layers[norm.recomputes];
  must(conv.kind == Kind::conv2d && conv.inputs[0] == 0, "must be a convolution of the input");
  must(conv.output == norm.inputs[0] && readers(plan, conv.output) == 1,
       "must be a convolution that nobody else reads");
  must(!plan.options.wants_support_x && !plan.options.wants_query_x,
       "excludes gradients of the network's input");
}

void check_epilogues(const Plan& plan, size_t i, const Layer& layer) {
  const bool linear = layer.kind == Kind::linear, wide = linear && !plan.params[layer.weight()].narrow;
  require(!layer.relu_out || wide || channel_norm(layer), i, "relu_out",
          "is for norms of images and linear layers of more than two outputs");
  require(!layer.relu_in || (linear && layer.inputs[0] > 0), i, "relu_in",
          "is for linear layers that read another layer");
  require(!layer.bias_cancels || rules(layer.kind).weight, i, "bias_cancels", "is for layers with a bias");
}

}  // namespace

void check_fused(const Plan& plan) {
  std::vector<bool> moves(plan.values.size(), false), written = moves;
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const Layer& layer = plan.layers[i];
    check_pool(plan, i, layer);
    check_recomputed(plan, i, layer);
    check_epilogues(plan, i, layer);
    for (int p : layer.params)
      if (p >= 0 && !plan.params[p].constant) moves[layer.output] = true;
    for (int in : layer.inputs)
      if (in >= 0 && moves[in]) moves[layer.output] = true;
  }
  for (size_t v = 0; v < moves.size(); ++v)
    if (plan.values[v].from_params != moves[v])
      throw std::invalid_argument("Plan: values[" + std::to_string(v) +
                                  "].from_params must say whether it depends on a parameter");
  for (size_t i = plan.layers.size(); i-- > 0;)
    for (int j = 0; j < 2; ++j) {
      const int in = plan.layers[i].inputs[j];
      require(plan.layers[i].adds[j] == (in >= 0 && written[in]), i, "adds",
              "must say whether a later reader of the input has written its gradient");
      if (in >= 0) written[in] = true;
    }
}

}  // namespace fm
