// conv2d: y = conv(x, W) + b on channels-last images; W [O, C, kh, kw] is kept as one matrix W^T
// [C, O] for each tap.
//
// Images of very few channels are gathered tap by tap into rows [taps * C] instead, and multiplied
// like any matrix.
//
// Where the output is not kept, nothing is done here: its reader does it, see ../recomputed_conv.h.
#pragma once

#include <algorithm>

#include "../families/bilinear.h"
#include "../winograd.h"

namespace fm::conv2d {

// Kernel, stride and padding, each of height and width.
constexpr Rules RULES = Rules(1).sizes(6).with_weight_and_bias();

constexpr i64 FEW_CHANNELS = 4;
constexpr i64 GATHERED_PIXELS = 256;  // at a time

struct Window {
  i64 kh, kw, sh, sw, ph, pw;
};
inline Window window(const Layer& layer) {
  const auto at = [&](int i) { return i64(layer.constants[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

// Whether the taps' matrices lie one below the other as a single one: then gathered rows can be
// multiplied with it.
inline bool gathers(const Plan& plan, const Layer& layer) {
  const Param& w = plan.params[layer.weight()];
  return w.channels() == 1 || (w.channels() <= FEW_CHANNELS && plan.padded(w.rows) <= 4 * plan.lane);
}

// Whether the layer's products go by way of Winograd's.
inline bool transforms(const Plan& plan, const Layer& layer, i64 examples) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  const Window v = window(layer);
  return winograd::pays(v.kh, v.kw, v.sh, v.sw, v.ph, v.pw, x.cols, y.cols, examples, y.height, y.width);
}

inline Needs needs(const Plan& plan, const Layer& layer, i64 examples) {
  const Value &x = plan.values[layer.inputs[0]], &y = plan.values[layer.output];
  require(layer.weight() >= 0, "a convolution has no weight");
  const Param& w = plan.params[layer.weight()];
  const Window v = window(layer);
  require(v.kh > 0 && v.kw > 0 && v.sh > 0 && v.sw > 0 && v.ph >= 0 && v.pw >= 0,
          "a convolution's window is none");
  require(x.channels && y.channels && x.rows == x.height * x.width && y.rows == y.height * y.width,
          "a convolution reads and writes images");
  require(w.matrix && w.taps == v.kh * v.kw && w.channels() * w.taps == w.cols && w.channels() == x.cols &&
              w.rows == y.cols,
          "a convolution's shapes differ");
  const i64 room_h = x.height + 2 * v.ph - v.kh, room_w = x.width + 2 * v.pw - v.kw;
  require(room_h >= 0 && room_w >= 0, "a convolution's window is larger than its image");
  require(y.height == room_h / v.sh + 1 && y.width == room_w / v.sw + 1,
          "a convolution's output has another size");
  check_bias(plan, layer);
  const i64 in = plan.padded(x.cols), out = plan.padded(y.cols), zeros = std::max(in, out);
  if (gathers(plan, layer)) return {0, zeros + 2 * GATHERED_PIXELS * plan.padded(w.cols)};
  return {0, zeros + (transforms(plan, layer, examples) ? winograd::temporary(in, out) : 0)};
}

// The scratch memory after the row of zeros.
template <class S>
S* memory(const Pass<S>& pass, const Layer& layer) {
  const auto& values = pass.plan.values;
  return pass.temporary + pass.plan.padded(std::max(values[layer.inputs[0]].cols, values[layer.output].cols));
}
template <class S>
const S* zeros(const Pass<S>& pass, const Layer& layer) {
  std::fill(pass.temporary, memory(pass, layer), S(0));
  return pass.temporary;
}

// What the taps of pixels [begin, end) of the output read of x: to[tap * C + c][pixel], rows
// GATHERED_PIXELS apart.
template <class S>
void gather(const Pass<S>& pass, const Layer& layer, const S* x, i64 ld_x, i64 begin, i64 end, S* to) {
  const Value &in = pass.plan.values[layer.inputs[0]], &out = pass.plan.values[layer.output];
  const Window v = window(layer);
  for (i64 pixel = begin; pixel < end;) {  // one row of an image, or what is wanted of it
    const i64 n = pixel / out.rows, oy = pixel % out.rows / out.width, ox = pixel % out.width;
    const i64 count = std::min(end - pixel, out.width - ox);
    for (i64 i = 0; i < v.kh; ++i) {
      const i64 y = oy * v.sh - v.ph + i;
      const bool inside = y >= 0 && y < in.height;
      for (i64 j = 0; j < v.kw; ++j) {
        const i64 shift = j - v.pw;  // of the pixels low .. high - 1 that read from within the row
        const i64 low = std::clamp((-shift + v.sw - 1) / v.sw - ox, i64(0), count);
        const i64 high =
            inside && in.width > shift ? std::clamp((in.width - shift - 1) / v.sw + 1 - ox, low, count) : low;
        for (i64 c = 0; c < in.cols; ++c) {
          S* row = to + ((i * v.kw + j) * in.cols + c) * GATHERED_PIXELS;
          const S* from = x + ((n * in.height + y) * in.width + ox * v.sw + shift) * ld_x + c;
          const i64 step = v.sw * ld_x;
          std::fill(row, row + low, S(0));
          if (step == 1)
            std::copy(from + low, from + high, row + low);
          else
            for (i64 k = low; k < high; ++k) row[k] = from[k * step];
          std::fill(row + high, row + count, S(0));
        }
      }
    }
    pixel += count, to += count;
  }
}

// Calls body(first pixel, pixels, gathered rows of each x) for chunks of the output's pixels
// [first, first + count).
template <class S, class Body>
void for_gathered(const Pass<S>& pass, const Layer& layer, i64 first, i64 count, const Factors<S>& f,
                  const Body& body) {
  const i64 room = GATHERED_PIXELS * pass.plan.params[layer.weight()].cols;
  S* const gathered = memory(pass, layer);
  for (i64 at = 0; at < count; at += GATHERED_PIXELS) {
    const i64 pixels = std::min(GATHERED_PIXELS, count - at);
    for (int p = 0; p < f.pairs; ++p)
      gather(pass, layer, f.x[p], f.ld_x[p], first + at, first + at + pixels, gathered + p * room);
    body(at, pixels, gathered, room);
  }
}

// A set's weight as one matrix [taps * C, O].
template <class S>
Matrix<S> gathered_weight(const Plan& plan, const Param& p, S* set) {
  return Matrix<S>::plain(set, plan.padded(p.rows));
}

// y = sum over pairs conv(x, w) + bias for `count` pixels of the output, the first of them at y.
template <class S>
void gathered_convolve(const Pass<S>& pass, const Layer& layer, i64 first, i64 count, const Factors<S>& f,
                       const S* bias, S* y) {
  const Plan& plan = pass.plan;
  const Param& p = plan.params[layer.weight()];
  const i64 ld_y = plan.values[layer.output].ld;
  for_gathered(pass, layer, first, count, f, [&](i64 at, i64 pixels, S* rows, i64 room) {
    Gemm<S> gemm;
    gemm.m = pixels, gemm.n = p.rows, gemm.k = p.cols, gemm.pairs = f.pairs;
    for (int i = 0; i < f.pairs; ++i)
      gemm.pair[i] = {rows + i * room, 1, GATHERED_PIXELS, gathered_weight(plan, p, f.w[i])};
    gemm.c = Matrix<S>::plain(y + at * ld_y, ld_y), gemm.bias = bias;
    pass.kernels.gemm(gemm);
  });
}

// The weight's gradient from `count` pixels of the output, whose gradient begins at dy.
template <class S>
void gathered_weight_gradient(const Pass<S>& pass, const Layer& layer, i64 first, i64 count,
                              const Factors<S>& f, const S* const* dy, Sink<S>& sink) {
  const Plan& plan = pass.plan;
  const Param& p = plan.params[layer.weight()];
  const i64 ld_y = plan.values[layer.output].ld;
  for_gathered(pass, layer, first, count, f, [&](i64 at, i64 pixels, S* rows, i64 room) {
    Gemm<S> gemm;
    gemm.m = p.cols, gemm.n = p.rows, gemm.k = pixels, gemm.pairs = f.pairs, gemm.scale = sink.scale;
    for (int i = 0; i < f.pairs; ++i)
      gemm.pair[i] = {rows + i * room, GATHERED_PIXELS, 1, Matrix<const S>::plain(dy[i] + at * ld_y, ld_y)};
    gemm.c = gathered_weight(plan, p, sink.to);
    if (sink.base()) gemm.base = gathered_weight(plan, p, sink.base());
    if (sink.also()) gemm.also = gathered_weight(plan, p, sink.also());
    pass.kernels.gemm(gemm);
    sink.written();
  });
}

struct Products {
  // y = sum conv(x, w) + bias
  template <class S>
  static void output(const Pass<S>& pass, const Layer& layer, const Factors<S>& f, const S* bias, bool,
                     S* y) {
    const Value &in = pass.plan.values[layer.inputs[0]], &out = pass.plan.values[layer.output];
    if (gathers(pass.plan, layer))
      return gathered_convolve(pass, layer, 0, pass.rows(layer.output), f, bias, y);
    const Window v = window(layer);
    Conv<S> conv;
    conv.examples = pass.geometry.examples, conv.c_h = out.height, conv.c_w = out.width;
    conv.a_h = in.height, conv.a_w = in.width;
    conv.kh = v.kh, conv.kw = v.kw, conv.sh = v.sh, conv.sw = v.sw, conv.ph = v.ph, conv.pw = v.pw;
    conv.k = in.cols, conv.n = out.cols, conv.pairs = f.pairs;
    for (int i = 0; i < f.pairs; ++i) conv.pair[i] = {f.x[i], f.ld_x[i], f.w[i]};
    conv.c = y, conv.ldc = out.ld, conv.bias = bias;
    run(pass, layer, conv);
  }

  // dx [+]= sum of the transposed convolutions of dy with w
  template <class S>
  static void input_gradient(const Pass<S>& pass, const Layer& layer, int pairs, const S* const* dy,
                             const ParamView<S>* const* w, S* dx) {
    const Value &in = pass.plan.values[layer.inputs[0]], &out = pass.plan.values[layer.output];
    const Window v = window(layer);
    Conv<S> conv;
    conv.transposed = true;
    conv.examples = pass.geometry.examples, conv.c_h = in.height, conv.c_w = in.width;
    conv.a_h = out.height, conv.a_w = out.width;
    conv.kh = v.kh, conv.kw = v.kw, conv.sh = v.sh, conv.sw = v.sw, conv.ph = v.ph, conv.pw = v.pw;
    conv.k = out.cols, conv.n = in.cols, conv.pairs = pairs;
    for (int i = 0; i < pairs; ++i) conv.pair[i] = {dy[i], out.ld, w[i]->mirror[layer.weight()]};
    conv.c = dx, conv.ldc = in.ld, conv.add = layer.adds[0];
    run(pass, layer, conv);
  }

  // For each tap, sum dy^T x of the pixels that it reads.
  template <class S>
  static void weight_gradient(const Pass<S>& pass, const Layer& layer, const Factors<S>& f,
                              const S* const* dy, Sink<S>& sink) {
    const Value &in = pass.plan.values[layer.inputs[0]], &out = pass.plan.values[layer.output];
    if (gathers(pass.plan, layer))
      return gathered_weight_gradient(pass, layer, 0, pass.rows(layer.output), f, dy, sink);
    const Window v = window(layer);
    ConvWeight<S> c;
    c.examples = pass.geometry.examples, c.a_h = in.height, c.a_w = in.width, c.b_h = out.height;
    c.b_w = out.width;
    c.kh = v.kh, c.kw = v.kw, c.sh = v.sh, c.sw = v.sw, c.ph = v.ph, c.pw = v.pw;
    c.k = in.cols, c.n = out.cols, c.pairs = f.pairs, c.ldb = out.ld;
    c.first_tap = 0, c.last_tap = v.kh * v.kw;
    for (int i = 0; i < f.pairs; ++i) c.pair[i] = {f.x[i], f.ld_x[i], dy[i]};
    c.c = sink.to, c.base = sink.base(), c.also = sink.also(), c.scale = sink.scale;
    if (transforms(pass.plan, layer, pass.geometry.examples))
      winograd::conv_weight(pass.kernels, c, zeros(pass, layer), memory(pass, layer));
    else
      pass.kernels.conv_weight(c);
  }

  template <class S>
  static void run(const Pass<S>& pass, const Layer& layer, Conv<S>& conv) {
    conv.zeros = zeros(pass, layer);
    if (transforms(pass.plan, layer, pass.geometry.examples))
      winograd::conv(pass.kernels, conv, memory(pass, layer));
    else
      pass.kernels.conv(conv);
  }
};

using Functions = Bilinear<Products>;

}  // namespace fm::conv2d
