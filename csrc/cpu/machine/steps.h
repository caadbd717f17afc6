// The instructions of the vector machine, as its executors read them. No standard header is
// included: kernels of one instruction set read this.
//
// An instruction is a loop nest over strided views. With one task in every SIMD lane each element
// is a vector over the tasks of a group; views then have one more dimension, of the lanes.
#pragma once

#include "../../shared/types.h"

namespace fm::machine {

// Where a view lies; fastmeta/trace/ir.py says what each space is for.
enum class Space : int {
  work,
  kept,
  once,
  constant,
  theta,
  fixed,
  batch,
  ints,
  direction,
  seed,
  grad,
  other,
  output,
  curvature
};
constexpr int SPACES = 14;
constexpr int MOST_DIMS = 12;

struct View {
  int space;
  bool dense;    // in one piece, in the order of the loop
  bool uniform;  // one element, or one vector over the lanes, for the whole loop
  bool ends;     // of a dense output: nothing of the same buffer comes after it
  i64 offset;
  i64 stride[MOST_DIMS];
};

enum class StepKind : int { map, reduce, product, gather, scatter };
enum class Reduction : int { sum, max, argmax };

// Arguments of maps are numbered: temporaries first, then inputs, numbers, outputs.
struct MicroOp {
  int op, to, a, b, c;
};

// clang-format off
#define FM_MACHINE_FUNCTIONS(F)                                                \
  F(copy) F(add) F(sub) F(mul) F(div) F(max) F(min) F(pow) F(lt) F(le) F(eq)   \
  F(ne) F(gate) F(where) F(neg) F(abs) F(relu) F(tanh) F(sigmoid) F(exp) F(expm1)      \
  F(log) F(log1p) F(sqrt) F(sin) F(cos) F(erf) F(sign) F(floor) F(ceil)        \
  F(round) F(trunc) F(atan2)
// clang-format on

enum class MapFunction : int {
#define FM_NAME(name) name,
  FM_MACHINE_FUNCTIONS(FM_NAME)
#undef FM_NAME
};

struct Step {
  StepKind kind;
  int dims;  // at least 1; of a product: batch, then m, n, k
  i64 n[MOST_DIMS];
  const View* views;  // map: inputs, outputs; reduce: x, out; gather, scatter: out, source, index;
                      // product: out, a, b, two more factors, start, gate
  int inputs, outputs, temps, numbers;
  const MicroOp* ops;
  int op_count;
  const void* splats;  // numbers, 64 bytes each
  i64 tile;            // elements of a temporary of a map
  int reduced;         // reduce: how many dimensions, the last ones
  Reduction reduction;
  bool accumulate, wraps;
  i64 more;  // product: the depth of a second one that is added, 0 for none
  bool starts, gates, relu;
  int updates;             // product: the adapted parameter whose whole gradient it completes, -1 for none
  i64 step, limit, start;  // gather and scatter; start: of argmax
  i64 steps[MOST_DIMS];    // of argmax
};

// Memory of one worker while it runs a program.
template <class S>
struct Memory {
  S* at[SPACES];
  const i64* ints;
  S* tiles;
  bool bad_index;
  // Where products that complete a gradient g leave `from` + scale[parameter] * g instead, or null.
  S* update_to;
  const S* update_from;
  const S* update_scale;
};

// What one instruction set provides.
template <class S>
struct Executor {
  // Instructions for one task, and for a task in every lane.
  void (*rows)(const Step* steps, i64 count, Memory<S>& memory);
  void (*lanes)(const Step* steps, i64 count, Memory<S>& memory);
  void (*lane_sums)(i64 n, const S* x, S* out);  // out[i] += the sum of the lanes of x[i]
  // out[rows[i]] += x[i], of `n` rows
  void (*add_rows)(i64 n, i64 width, const i64* rows, const S* x, S* out);
};
struct Executors {
  Executor<float> f32;
  Executor<double> f64;
};

// Elements past the end of every space that may be read, and past the end of a buffer that may be
// written.
constexpr i64 SLACK = 16;
// Of a map.
constexpr int MOST_ARGS = 160;

}  // namespace fm::machine
