// The kernels that one instruction set provides: what the meta-step is written in.
//
// Buffers are padded to 64 bytes per row and every padding column holds zero before and after each
// kernel.
#pragma once

#include "../shared/loss_call.h"
#include "../shared/types.h"
#include "machine/steps.h"
#include "update_rules.h"

namespace fm {

// c = mask(relu([base +] [also +] scale * sum_p a_p b_p + bias)) for c of m rows and n columns;
// padding columns become zero.
template <class S>
struct Gemm {
  i64 m, n;
  int pairs = 1;
  i64 k;
  struct Pair {
    const S* a;  // element (r, k) at a[r * a_row + k * a_k]; one of the strides is 1
    i64 a_row, a_k;
    Matrix<const S> b;  // [k, n]
    i64 own_k = 0;      // if it is not the common k
  } pair[2];
  Matrix<S> c;
  Matrix<const S> base = {};  // added if present; may be c
  Matrix<const S> also = {};  // likewise, beside base
  S scale = 1;
  const S* bias = nullptr;  // [n] added to every row if present
  bool relu = false;
  Matrix<const S> mask = {};  // c is zeroed where mask <= 0, if present

  // Where a tile of c reads its operands.
  struct Operands {
    const S* a;
    i64 a_row, a_k;
    const S* b;
    i64 ldb, k;
  };
  i64 depth(int p) const { return pair[p].own_k ? pair[p].own_k : k; }
};

// out = [base +] [also +] scale * the sum of `rows` rows, `ld` apart; n padded.
template <class S>
struct ColumnSums {
  i64 rows, n;
  const S* a;
  i64 ld;
  const S *base, *also;
  S scale;
  S* out;
};

// c[r, o] = sum_p <a_p[r, :], b_p[o, :]> + bias[o] for few outputs o.
template <class S>
struct Dot {
  i64 m, n, k;
  int pairs = 1;
  struct Pair {
    const S* a;  // [m, k], rows a_row apart
    i64 a_row;
    const S* b;  // [n, k], rows b_row apart
    i64 b_row;
  } pair[2];
  S* c;  // [m, ldc]; columns n .. ldc are zeroed
  i64 ldc;
  const S* bias = nullptr;
};

// dst[c, r] = src[r, c] for a rows x cols matrix; a padded destination is written up to its padding
// (zeros).
template <class S>
struct Transpose {
  Matrix<const S> src;
  Matrix<S> dst;
  i64 rows, cols;
  bool dst_padded;
};

template <class S>
struct Elementwise {
  Function function;
  S c0, c1;
  i64 rows, cols, ld, ld_x;
  bool accumulate;  // add to dx / rdx instead of storing
  const S *x, *y;   // [rows, cols] input (ld_x apart) and output
  const S *dy, *rx, *rdy;
  S* out;  // y, dx, ry or rdx
};

// The elementary functions of vector_math.inl, each of one number; pow besides takes two.
#define FM_ELEMENTARY(X) X(exp) X(expm1) X(log) X(log1p) X(tanh) X(sigmoid) X(sin) X(cos) X(erf) X(sqrt)
#define FM_ENUMERATOR(name) name,
enum class ElementaryName : int { none, FM_ELEMENTARY(FM_ENUMERATOR) pow };
#undef FM_ENUMERATOR

// out[i] = f(x[i]), f(x[i], y[i]) or, with y = f(x), a derivative of f at x, for arrays of no particular
// size.
template <class S>
struct Elementary {
  ElementaryName name;  // none: an element-wise function
  Function function;
  int order;  // 0: its value, 1 and 2: its derivatives
  S c0, c1;
  i64 count;
  const S *x, *y;
  S* out;
};

// out[c] += sum over rows of (x[r, c] - center[c])^2; n padded.
template <class S>
struct ColumnSquares {
  i64 rows, n;
  const S* x;
  i64 ld;
  const S* center;
  S* out;
};

// Over rows: sum += sum a, sum_x += sum a (x - center) and, if there is b, sum_b += sum b d; n
// padded. Where there is a mask, a and b count as zero where it is not positive.
template <class S>
struct ColumnProducts {
  i64 rows, n;
  const S* a;
  i64 ld;  // of a and b
  const S* x;
  i64 ld_x;
  const S* center;
  const S *b, *d;
  i64 ld_d;
  const S* mask;
  i64 ld_mask;
  S *sum, *sum_x, *sum_b;
};

// out[r, c] = [out +] constant[c] + sum over terms of coefficients[c] * from[r, c], the first
// term's rows less center[c]; then relu, if asked for. Where there is a mask, `masked` terms (or
// all of out) count as zero where it is not positive.
template <class S>
struct ColumnCombination {
  i64 rows, n;  // n padded
  int terms;
  struct Term {
    const S* from;
    i64 ld;
    const S* coefficients;
    bool masked;
  } term[4];
  const S *center, *constant;
  bool relu;
  const S* mask;
  i64 ld_mask;
  bool mask_out;
  S* out;
  i64 ld;
  bool add;
};

// Passes over windows side by side of which only the maximum is kept, at the pixel of the window
// that positions say. See pooled_columns.inl.
template <class S>
struct PooledColumns {
  i64 images, in_h, in_w, out_h, out_w, kh, kw;
  i64 n;  // padded columns
  const S* x;
  i64 ld_x;
  const S *center, *from_x;  // x less center, times from_x
  const S* rx;
  i64 ld_rx;
  const S* from_rx;
  struct {
    const S *from, *coefficients;
  } pooled[2];
  i64 ld_pooled;  // of pooled and mask
  S *positions, *maxima;
  i64 ld_positions;  // of both
  const S* mask;     // pooled rows count as zero where it is not positive, if present
  const S* constant;
  bool relu, add;
  S* out;
  i64 ld_out;
};

// Groups of `rows` rows of `cols` columns, each normalised as one, with weight and bias [rows *
// cols]; see layer_norm.inl.
template <class S>
struct LayerNorm {
  i64 groups, rows, cols, ld_x, ld, ld_rx, ld_out;  // ld: of the output and its gradients
  bool centred;                                     // the mean of a group is taken away
  S eps;
  const S *x, *w, *b;                // w, b may be null
  const S *dy, *rx, *rdy, *vw, *vb;  // null where the pass has none
  S* state;                          // [groups, 2]: mean and 1 / sqrt(var + eps), written by forward
  S* out;                            // y, dx, ry or rdx
  bool add;
  S *dw, *db;  // added to, or null
};

// Windows over images of n padded channels. Gathering goes from the image to the windows,
// scattering back.
template <class S>
struct Pool {
  i64 examples, in_h, in_w, out_h, out_w;
  i64 kh, kw, sh, sw, ph, pw;
  bool adaptive, count_padding;
  i64 divisor;  // 0: the window's size
  i64 n;
  const S* from;
  i64 ld_from;
  S* to;
  i64 ld_to;
  bool add;        // scattering only
  int* positions;  // max_pool: [windows, n]
};

// c = [c +] sum_p conv(a_p, w_p) [+ bias] over images of channels-last pixels, or with the
// transposed convolution, whose c has the shape of the other one's input.
template <class S>
struct Conv {
  bool transposed = false;
  i64 examples, c_h, c_w, a_h, a_w;
  i64 kh, kw, sh, sw, ph, pw;  // of the convolution itself
  i64 k, n;                    // channels of a and of c
  int pairs = 1;
  struct Pair {
    const S* a;  // [examples * a_h * a_w, k], rows lda apart
    i64 lda;
    const S* w;  // for every tap a matrix [k, n] in panels
  } pair[2];
  S* c;  // [examples * c_h * c_w, n], rows ldc apart
  i64 ldc;
  bool add = false;
  const S* bias = nullptr;  // [n]; not together with `add`
  const S* zeros;           // [k]
};

// For every tap, c = [base +] [also +] scale * sum_p sum over pixels of a_p(pixel under the tap)^T
// b_p(pixel), [k, n].
template <class S>
struct ConvWeight {
  i64 examples, a_h, a_w, b_h, b_w;
  i64 kh, kw, sh, sw, ph, pw;
  i64 k, n;  // channels of a and of b
  int pairs = 1;
  struct Pair {
    const S* a;  // [examples * a_h * a_w, k], rows lda apart
    i64 lda;
    const S* b;  // [examples * b_h * b_w, n], rows ldb apart
  } pair[2];
  i64 ldb;
  i64 first_tap, last_tap;  // those that are asked for
  S* c;
  const S *base, *also;
  S scale;
};

// Between images and the 16 matrices of Winograd's F(2x2, 3x3), a row of n padded channels for each
// tile: see cpu/winograd.h. A tile is 2 x 2 pixels of one image and the 4 x 4 of the other that
// they depend on.
template <class S>
struct WinogradTiles {
  i64 begin, end;                // tiles of all examples, row by row
  i64 tiles_h, tiles_w;          // of an example
  i64 height, width, top, left;  // of the image, and where its first tile begins
  i64 n;
  const S* from;
  i64 ld_from;  // of the image, or of the matrices
  S* to;
  i64 ld_to, step;        // step: from one matrix to the next
  bool add;               // to the image
  const S *bias, *zeros;  // [n]; no bias if null
};

// Nine taps of n elements each -> 16 matrices, or 16 matrices -> taps = [base +] [also +] scale *
// gradient.
template <class S>
struct WinogradWeight {
  i64 n, step_from, step_to;
  const S* from;
  S* to;
  bool flip;  // the taps are read last to first
  const S *base, *also;
  S scale;
};

template <class S>
struct Kernels {
  void (*gemm)(const Gemm<S>&);
  void (*gemms)(const Gemm<S>*, i64 count);  // independent of each other
  void (*dot)(const Dot<S>&);
  void (*transpose)(const Transpose<S>&);

  void (*elementwise_forward)(const Elementwise<S>&);
  void (*elementwise_backward)(const Elementwise<S>&);
  void (*elementwise_tangent)(const Elementwise<S>&);
  void (*elementwise_tangent_backward)(const Elementwise<S>&);

  double (*loss)(const LossCall<S>&);        // value; dz, dtarget, dweights where asked for
  void (*loss_tangent)(const LossCall<S>&);  // their tangents along rz

  // out = a [+ b], n padded
  void (*add)(i64 n, const S* a, const S* b, S* out);
  double (*inner)(i64 n, const S* a, const S* b);
  void (*column_sums)(const ColumnSums<S>&);

  void (*column_squares)(const ColumnSquares<S>&);
  void (*column_products)(const ColumnProducts<S>&);
  void (*column_combination)(const ColumnCombination<S>&);
  void (*pooled_forward)(const PooledColumns<S>&);
  void (*pooled_pick)(const PooledColumns<S>&);
  void (*pooled_combination)(const PooledColumns<S>&);

  void (*elementary)(const Elementary<S>&);

  void (*layer_norm_forward)(const LayerNorm<S>&);
  void (*layer_norm_backward)(const LayerNorm<S>&);
  void (*layer_norm_tangent)(const LayerNorm<S>&);
  void (*layer_norm_tangent_backward)(const LayerNorm<S>&);

  void (*max_pool_forward)(const Pool<S>&);
  void (*max_pool_gather)(const Pool<S>&);
  void (*max_pool_scatter)(const Pool<S>&);
  void (*avg_pool_gather)(const Pool<S>&);
  void (*avg_pool_scatter)(const Pool<S>&);

  void (*conv)(const Conv<S>&);
  void (*conv_weight)(const ConvWeight<S>&);
  void (*winograd_input)(const WinogradTiles<S>&);             // B^T d B of 4 x 4 pixels
  void (*winograd_output)(const WinogradTiles<S>&);            // A^T m A, to 2 x 2 pixels
  void (*winograd_gradient)(const WinogradTiles<S>&);          // A d A^T of 2 x 2 pixels
  void (*winograd_weight)(const WinogradWeight<S>&);           // G g G^T
  void (*winograd_weight_gradient)(const WinogradWeight<S>&);  // G^T u G

  // Plain SGD: theta' = theta - alpha g, and next_g = g, if given; v = -alpha lambda, added to
  // `start`, if given.
  void (*sgd_update)(i64 n, S alpha, const S* alphas, const S* theta, const S* g, S* next, S* next_g);
  void (*sgd_direction)(i64 n, S alpha, const S* alphas, const S* lambda, const S* start, S* v);

  // The other update rules.
  void (*rule_step)(const RuleCall<S>&);
  void (*rule_back)(const RuleCall<S>&);
  void (*clip_squares)(const ClipCall<S>&, S* squares);
  void (*clip)(const ClipCall<S>&, S* out);
  void (*clip_dots)(const ClipCall<S>&, const S* v, S* dots);
  double (*clip_back)(const ClipCall<S>&, const S* along, S* v);
};

// The peak loop of independent multiply-adds: returns the number of floating point operations done.
using PeakLoop = double (*)(i64 iterations);

struct InstructionSet {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  PeakLoop peak_f32, peak_f64;
  int vector_bytes;
  const machine::Executors* machine;
};

extern const InstructionSet isa_base;
#ifdef FASTMETA_X86
extern const InstructionSet isa_avx2;
extern const InstructionSet isa_avx512;
#endif

// The best one that this processor runs, or the one named by FASTMETA_CPU_ISA.
const InstructionSet& instruction_set();

}  // namespace fm
