// The memory plan of one (network, shapes, options): made once, read by every call.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../shared/types.h"
#include "checkpoints.h"
#include "update_rules.h"

namespace fm {

// What a plan may ask for: far more than anybody has memory for, and little enough that no product
// of sizes overflows.
constexpr i64 MOST_LAYERS = 1 << 15;
constexpr i64 MOST_STEPS = 1 << 20;
constexpr i64 MOST_EXAMPLES = i64(1) << 31;
constexpr i64 MOST_ELEMENTS = i64(1) << 40;  // of a value, of a parameter, of a batch of one value

// Matrices of at most this many rows are multiplied by inner products: a padded vector would be
// mostly empty.
constexpr i64 NARROW_ROWS = 2;

// A value of the layer program: `rows` rows of `cols` columns an example, rows `ld` apart in
// memory.
//
// Torch's order is [rows, cols], or for an image (`channels`) [cols, height, width] with rows =
// height * width pixels: images are channels-last inside.
struct Value {
  i64 rows = 1, cols = 1, ld = 0;
  i64 height = 1, width = 1;
  bool channels = false;
  bool from_params = false;  // depends on a parameter: has a tangent, and a gradient worth computing
};

struct Layer {
  Kind kind;
  Function function = Function::none;  // elementwise: which one
  bool adaptive = false;               // avg_pool2d: windows by the sizes of the images alone
  std::array<double, MOST_CONSTANTS> constants = {};
  int given_constants = 0;
  int inputs[2] = {-1, -1};
  int output = -1;
  std::array<int, 4> params = {-1, -1, -1, -1};
  int index = 0;  // in Plan::layers
  // What fastmeta/graph has decided:
  bool relu_out = false;          // linear, norms: the relu after it is done here
  bool relu_in = false;           // linear: its input is made by such a relu: dx is masked by it
  i64 pool_h = 0, pool_w = 0;     // norms: the max-pool after it, with windows side by side, is done here
  int recomputes = -1;            // norms: the convolution that is computed here, and need not be kept
  bool bias_cancels = false;      // a norm takes the bias away again: its gradient is zero
  bool adds[2] = {false, false};  // backward: a later reader has written the input's gradient before
  int weight() const { return params[0]; }
  int bias() const { return params[1]; }
};

// A parameter tensor as torch has it, [rows, cols] or [cols], and its place in a parameter set.
//
// A matrix W is kept transposed, in panels, as the forward pass reads it ("wide"); one of few rows
// as it is ("narrow"). A wide matrix whose layer has an input gradient is also kept untransposed
// (`mirror`).
//
// A convolution's weight [O, C, taps] is a wide matrix [O, C] for each tap, one after the other,
// and so is its mirror.
struct Param {
  i64 rows = 1, cols = 1, taps = 1;
  bool matrix = false, narrow = false, mirrored = false;
  bool constant = false;  // a buffer of the network: shared, and never differentiated by
  bool per_task = false, adapted = false;
  bool rate_element = false, rate_per_task = false, rate_per_step = false;
  i64 size = 0, offset = 0;  // padded
  i64 mirror_size = 0, mirror_offset = 0;
  i64 rate_sum_offset = 0, rate_sum_size = 0;  // gradient of the rate: [K or 1][size or one line]
  i64 numel() const { return rows * cols; }
  i64 channels() const { return cols / taps; }
};

// Where the values of one batch lie inside a block, and after them what layers keep beside their
// values (statistics, positions of maxima). Blocks of gradients hold no state. A large value that
// is cheap to recompute is not kept.
struct Geometry {
  i64 examples = 0, size = 0, size_with_state = 0;
  std::vector<i64> offset;  // of every value
  std::vector<i64> state;   // of every layer
  bool keeps(int value) const { return offset[value] >= 0; }
};

struct Options {
  i64 steps = 0, support = 0, query = 0;  // K, N, M; 0: absent
  bool second_order = true, store = true, gradient = false, support_per_step = false;
  bool wants_rates = false, wants_support_x = false, wants_query_x = false;
  std::vector<double> support_step_weights;  // K, or empty: support losses are not in the objective
  Schedule schedule;
  Rule rule;
  LossSpec loss, query_loss;
};

struct Plan {
  std::vector<Value> values;
  std::vector<Layer> layers;
  std::vector<Param> params;
  int output = 0;
  Options options;
  bool is_double = false;
  i64 lane = 16;  // elements in 64 bytes

  bool alias_input = false;  // the user's input serves as value 0 as it stands
  i64 input_ld = 0;          // distance between the rows of value 0
  i64 temporary = 0;         // elements of scratch memory that a layer may use while it runs
  Geometry support, query;
  i64 set_size = 0;     // one parameter set
  i64 mirror_size = 0;  // its mirrors
  i64 range_sums = 0, task_sums = 0;
  i64 number_sum_offset = 0;  // gradients of the rule's numbers: [K][RULE_NUMBERS]; in range_sums

  // Offsets into the workspace of one running task, in elements.
  struct {
    i64 theta, theta_stride, theta_mirror, mirror_stride;  // theta_0 (if any is per task), theta_1 .. theta_K
    i64 values, value_stride, deltas, delta_stride;        // support activations, one step or K steps
    i64 query_values, query_deltas;
    i64 tangents, tangent_deltas;
    i64 gradient, direction, direction_mirror, lambda, updates, update_stride, rates, task_sums;
    // of rules that are not plain: gradients and states of the steps, a parameter set each; dJ/dstate;
    // clipped gradients; factors, a line for each step
    i64 rule_gradients, rule_states, mbar, clipped, factors, rule_stride;
    i64 checkpoints, checkpoint_stride;  // theta, and the state of the rule
    i64 temporary, input_layer, total;
  } at;

  bool tied = false;     // some parameter is used by several layers
  int input_layer = -1;  // the layer that runs without its adapted weights, see input_layer.h; -1: none

  bool checkpointed() const { return !options.schedule.empty(); }
  // Whether what the steps leave for the way back is there for all of them.
  bool keeps_steps() const { return options.gradient && !checkpointed(); }
  bool keeps_updates() const { return options.wants_rates && options.store && plain_rule(); }

  i64 value_ld(i64 cols) const;
  i64 padded(i64 n) const { return (n + lane - 1) / lane * lane; }
  // theta' = theta - alpha g, nothing more: updates can go into epilogues.
  bool plain_rule() const { return options.rule.plain(); }
  // Fuses, lays out and measures; throws std::invalid_argument for an inconsistent program.
  void finish();

 private:
  void lay_out_input();
  void choose_input_layer();
  i64 input_layer_size() const;
};

}  // namespace fm
