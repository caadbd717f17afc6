// What the host says of one specialisation: the generated source defines tables of these, and
// includes kernel.h after them. Sizes and offsets count elements.
#pragma once

#include "../shared/loss_call.h"
#include "../shared/types.h"
#include "../shared/update_rules.h"

namespace fm::cuda {

// Where something lies: in the block's shared memory, in its own piece of global memory, or where
// the user has it.
enum class Space : int { shared, global, user };

// Of a cluster of blocks each has a rank. What consists of parts, parameters or values, has each
// part in the memory of one rank. Areas begin at the same place in all ranks.
struct Area {
  Space space;
  int at;
};

// How a product is made: by multiply-adds of each thread, or on tensor cores from operands rounded
// to TF32, to bfloat16, or split into two numbers of TF32 each, which together are as good as a
// float32.
enum class Multiply : int { fma, split, tf32, bf16 };

// A value: `rows` rows of `cols` columns an example, `ld` apart, of which vectors of `vector`
// elements can be loaded.
// x, d, rx, rd: where it stands, for every example, in blocks of values, of their gradients, and of
// the tangents of both; -1: it is not kept there.
struct Value {
  int rows, cols, ld, vector;
  int x, d, rx, rd;
  bool from_params;  // depends on a parameter: has a tangent, and a gradient worth computing
  int rank;
  bool channels;  // an image, channels-last
};

// Where a norm keeps what it knows of its groups: at examples * each + fixed of a block of values.
struct Statistics {
  int each, fixed;
};

struct Layer {
  Kind kind;
  double constants[MOST_CONSTANTS];  // its own, as it was captured
  Function function;                 // elementwise: its own; others: of the activation in the epilogue
  double c0, c1;                     // of the function
  int inputs[2];
  int output;
  int weight, bias;
  int mean, var;  // batch_norm: running statistics among the parameters; -1: the batch's own
  Statistics statistics, tangent_statistics;
  Multiply multiply;
  int pre;       // the value before the activation in the epilogue; -1: there is none
  bool adds[2];  // backward: another consumer has written the input's gradient before
  bool last[2];  // ... and none will after this one
};

// A parameter [rows, cols] and its place in a parameter set (theta_k, lambda and the like).
struct Param {
  int rows, cols, ld, vector;
  int at;
  bool per_task, adapted, tied;
  bool buffer;  // no parameter, but a buffer that is read like one
  bool rate_element, rate_per_task, rate_per_step;
  int column;       // of its gradient among the sums over tasks
  int rate_column;  // likewise of its rate's gradient
  int rate_slot;    // scalar rates: of the sum over its elements
  int gradient;     // tied: where its uses are summed
  int rank;
  constexpr int numel() const { return rows * cols; }
  constexpr int size() const { return rows * ld; }
};

// The update rule, where it is not SGD with momentum and weight decay as plain numbers, of which
// Options says what there is. Bit i of a set of numbers stands for RuleNumber i.
struct RuleSpec {
  bool general;  // false: nothing of this holds
  RuleKind kind;
  bool nesterov, centered;
  unsigned on, learned, wanted;  // of any effect; tensors of the call; whose gradients are wanted
  int states;                    // sets that pass from step to step
  int column;                    // of the gradients of numbers among the sums over tasks
};

struct Options {
  int steps, support, query;  // K, N, M; 0: absent
  bool second_order, store, gradient, support_per_step;
  bool wants_params, wants_rates, wants_support_x, wants_query_x;
  bool momentum, weight_decay, step_weights;
  LossSpec loss, query_loss;
  RuleSpec rule;
};

// Where everything lies. Spaces of areas that go together are alike: values and deltas; the query's
// and the tangents'.
struct Layout {
  int threads;    // of a block
  Area theta;     // [frozen parameters][adapted ones of step 0][of step 1] ..., or of one step at a time
  bool keep_all;  // theta_0 .. theta_K at once
  int frozen, set;
  bool restores;    // the sweep back loads theta_k again, since not all are kept
  int checkpoints;  // ... from here in global memory, theta_1 .. theta_{K-1}; -1: there are none
  Area input, query_input;
  Area values, deltas;
  int value_stride, delta_stride;  // from one step to the next; 0: only one step's are kept
  Area query_values, query_deltas, tangents, tangent_deltas;
  Area lambda, direction, gradient, updates;
  Area gradients, states, mbar, norms;  // of a general rule: rule_memory.h
  Area sums, terms;                     // [rate slots, rule slots][threads] doubles; what loss.h sums
  int columns;                          // sums over tasks: gradients of shared parameters and rates, the loss
  int slab;                             // elements of global memory of a rank
};

}  // namespace fm::cuda
