#include "fuse.h"

#include <algorithm>

#include "layers/conv2d.h"

namespace fm {

namespace {

int consumers(const Plan& plan, int value) {
  int n = value == plan.output;
  for (const Layer& layer : plan.layers)
    for (int in : layer.inputs) n += in == value;
  return n;
}

// The first layer that reads `value` as its first input, or the end.
std::vector<Layer>::iterator reader(Plan& plan, int value) {
  return std::find_if(plan.layers.begin(), plan.layers.end(),
                      [&](const Layer& l) { return l.inputs[0] == value; });
}

bool channel_norm(const Layer& layer) {
  return layer.kind == Kind::batch_norm || layer.kind == Kind::group_norm;
}

void replace(Plan& plan, int from, int to) {
  for (Layer& layer : plan.layers)
    for (int& in : layer.inputs)
      if (in == from) in = to;
  if (plan.output == from) plan.output = to;
}

// The user's input is dense: a reshape that is its only reader just says how to read it.
void fold_input_reshape(Plan& plan) {
  while (!plan.layers.empty() && plan.layers[0].kind == Kind::reshape && plan.layers[0].inputs[0] == 0 &&
         consumers(plan, 0) == 1) {
    const int out = plan.layers[0].output;
    plan.values[0] = plan.values[out];
    plan.layers.erase(plan.layers.begin());
    replace(plan, out, 0);
  }
}

// Whether two values lie in memory alike: then the reader of one can read the other. Two images
// must also have the same height and width, which windows go by.
bool same_layout(const Value& a, const Value& b) {
  if (a.rows != b.rows || a.cols != b.cols) return false;
  if (a.channels && b.channels) return a.height == b.height && a.width == b.width;
  return a.channels == b.channels || a.rows == 1 || a.cols == 1;
}

void drop_trivial_reshapes(Plan& plan) {
  for (size_t i = 0; i < plan.layers.size();) {
    const Layer layer = plan.layers[i];
    Value& from = plan.values[layer.inputs[0]];
    const Value& to = plan.values[layer.output];
    if (layer.kind != Kind::reshape || !same_layout(from, to)) {
      ++i;
      continue;
    }
    if (to.channels) from = to;  // whoever reads it as an image has its height and width from there
    plan.layers.erase(plan.layers.begin() + i);
    replace(plan, layer.output, layer.inputs[0]);
  }
}

// linear -> relu -> linear, where nobody else reads what lies between: the relu moves into the
// epilogues.
void fuse_relu(Plan& plan) {
  for (size_t i = 0; i + 1 < plan.layers.size(); ++i) {
    Layer& linear = plan.layers[i];
    if (linear.kind != Kind::linear || plan.params[linear.weight()].narrow ||
        consumers(plan, linear.output) != 1)
      continue;
    auto relu = reader(plan, linear.output);
    if (relu == plan.layers.end() || relu->kind != Kind::elementwise || relu->function != Function::relu ||
        consumers(plan, relu->output) != 1)
      continue;
    auto next = reader(plan, relu->output);
    if (next == plan.layers.end() || next->kind != Kind::linear) continue;
    linear.relu_out = next->relu_in = true;
    const int dead = relu->output;
    plan.layers.erase(relu);
    replace(plan, dead, plan.layers[i].output);
  }
}

// linear or conv2d -> norm by the batch's own mean of each channel: a bias comes to nothing.
void cancel_bias(Plan& plan) {
  for (Layer& layer : plan.layers) {
    if ((layer.kind != Kind::linear && layer.kind != Kind::conv2d) || consumers(plan, layer.output) != 1)
      continue;
    const auto norm = reader(plan, layer.output);
    if (norm == plan.layers.end()) continue;
    layer.bias_cancels =
        (norm->kind == Kind::batch_norm && norm->params[2] < 0) ||
        (norm->kind == Kind::group_norm && i64(norm->constants[0]) == plan.values[norm->inputs[0]].cols);
  }
}

// norm -> relu, where nobody else reads what lies between: the norm's passes do both.
void fuse_norm_relu(Plan& plan) {
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    Layer& norm = plan.layers[i];
    if (!channel_norm(norm) || consumers(plan, norm.output) != 1) continue;
    auto relu = reader(plan, norm.output);
    if (relu == plan.layers.end() || relu->kind != Kind::elementwise || relu->function != Function::relu)
      continue;
    norm.relu_out = true;
    const int dead = relu->output;
    plan.layers.erase(relu);
    replace(plan, dead, plan.layers[i].output);
  }
}

// norm [-> relu] -> max-pool over windows side by side: what is not pooled is never written down.
void fuse_norm_pool(Plan& plan) {
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    Layer& norm = plan.layers[i];
    if (!channel_norm(norm) || consumers(plan, norm.output) != 1) continue;
    auto pool = reader(plan, norm.output);
    if (pool == plan.layers.end() || pool->kind != Kind::max_pool2d) continue;
    const auto& c = pool->constants;
    if (c[0] != c[2] || c[1] != c[3] || c[4] != 0 || c[5] != 0) continue;
    const Value &x = plan.values[norm.output], &y = plan.values[pool->output];
    if (y.height * i64(c[0]) > x.height || y.width * i64(c[1]) > x.width) continue;  // rounded up
    norm.pool_h = i64(c[0]), norm.pool_w = i64(c[1]);
    norm.output = pool->output;
    plan.layers.erase(pool);
  }
}

}  // namespace

void fuse(Plan& plan) {
  fold_input_reshape(plan);
  drop_trivial_reshapes(plan);
  fuse_relu(plan);
  cancel_bias(plan);
  fuse_norm_relu(plan);
  fuse_norm_pool(plan);
}

void choose_recomputed(Plan& plan) {
  if (plan.options.wants_support_x || plan.options.wants_query_x) return;
  for (const Layer& conv : plan.layers) {
    if (conv.kind != Kind::conv2d || conv.inputs[0] != 0 || !conv2d::gathers(plan, conv)) continue;
    const auto norm = reader(plan, conv.output);
    if (norm != plan.layers.end() && channel_norm(*norm) && consumers(plan, conv.output) == 1)
      norm->recomputes = conv.index;
  }
}

}  // namespace fm
