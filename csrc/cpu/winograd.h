// Convolutions of 3 x 3 taps and stride 1 by Winograd's F(2x2, 3x3): 16 products a tile of 2 x 2
// pixels instead of 36 (Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", 2016,
// section 4).
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A,    dg = G^T [ sum over tiles (A dY A^T) . (B^T d B) ] G
//
// where "." is, for each of the 16 elements, a product of matrices over channels (or tiles). The
// transposed convolution is the convolution with flipped taps. Tiles are transformed a block at a
// time, so that they stay in the cache: that costs a few per cent, less than writing and reading
// the transformed images once would.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace fm::winograd {

constexpr i64 TILES = 96;  // of a block

// Enough pixels in whole tiles and enough channels to pay for the transforms; by shapes alone.
inline bool pays(i64 kh, i64 kw, i64 sh, i64 sw, i64 ph, i64 pw, i64 channels_in, i64 channels_out,
                 i64 examples, i64 height, i64 width) {
  if (kh != 3 || kw != 3 || sh != 1 || sw != 1 || ph > 2 || pw > 2) return false;
  const i64 tiles = ((height + 1) / 2) * ((width + 1) / 2);
  return std::min(channels_in, channels_out) >= 16 && tiles * examples >= 32 &&
         tiles * 16 * 4 <= height * width * 9 * 3;
}

// Scratch elements for any of the three products, of channels padded to `in` and `out`.
inline i64 temporary(i64 in, i64 out) { return 16 * (2 * in * out + 2 * TILES * (in + out)); }

template <class S>
WinogradTiles<S> tiles(i64 height, i64 width, i64 top, i64 left, i64 tiles_h, i64 tiles_w, const S* zeros) {
  WinogradTiles<S> t{};
  t.tiles_h = tiles_h, t.tiles_w = tiles_w, t.height = height, t.width = width, t.top = top, t.left = left;
  t.zeros = zeros;
  return t;
}

template <class S>
void conv(const Kernels<S>& kernels, const Conv<S>& v, S* memory) {
  const i64 k = pad<S>(v.k), n = pad<S>(v.n), matrix = v.k * n;
  S *weights[2], *inputs[2];
  for (int p = 0; p < v.pairs; ++p) {
    weights[p] = memory, memory += 16 * matrix;
    kernels.winograd_weight(
        {matrix, matrix, matrix, v.pair[p].w, weights[p], v.transposed, nullptr, nullptr, S(1)});
  }
  for (int p = 0; p < v.pairs; ++p) inputs[p] = memory, memory += 16 * TILES * k;
  S* const outputs = memory;

  const i64 tiles_h = (v.c_h + 1) / 2, tiles_w = (v.c_w + 1) / 2, count = v.examples * tiles_h * tiles_w;
  const i64 top = v.transposed ? v.ph - 2 : -v.ph, left = v.transposed ? v.pw - 2 : -v.pw;
  WinogradTiles<S> in = tiles(v.a_h, v.a_w, top, left, tiles_h, tiles_w, v.zeros);
  in.n = in.ld_to = k, in.step = TILES * k;
  WinogradTiles<S> out = tiles(v.c_h, v.c_w, 0, 0, tiles_h, tiles_w, v.zeros);
  out.n = out.ld_from = n, out.step = TILES * n, out.from = outputs, out.to = v.c, out.ld_to = v.ldc;
  out.add = v.add, out.bias = v.bias;
  for (i64 begin = 0; begin < count; begin += TILES) {
    const i64 end = std::min(begin + TILES, count);
    in.begin = out.begin = begin, in.end = out.end = end;
    Gemm<S> calls[16];
    for (int p = 0; p < v.pairs; ++p) {
      in.from = v.pair[p].a, in.ld_from = v.pair[p].lda, in.to = inputs[p];
      kernels.winograd_input(in);
    }
    for (int i = 0; i < 16; ++i) {
      Gemm<S>& g = calls[i];
      g.m = end - begin, g.n = v.n, g.k = v.k, g.pairs = v.pairs;
      for (int p = 0; p < v.pairs; ++p)
        g.pair[p] = {inputs[p] + i * in.step, k, 1, Matrix<const S>::panels(weights[p] + i * matrix, v.k, n)};
      g.c = Matrix<S>::plain(outputs + i * out.step, n);
    }
    kernels.gemms(calls, 16);
    kernels.winograd_output(out);
  }
}

template <class S>
void conv_weight(const Kernels<S>& kernels, const ConvWeight<S>& v, const S* zeros, S* memory) {
  const i64 k = pad<S>(v.k), n = pad<S>(v.n), matrix = v.k * n;
  S *inputs[2], *gradients[2];
  for (int p = 0; p < v.pairs; ++p) {
    inputs[p] = memory, memory += 16 * TILES * k;
    gradients[p] = memory, memory += 16 * TILES * n;
  }
  S* const sums = memory;

  const i64 tiles_h = (v.b_h + 1) / 2, tiles_w = (v.b_w + 1) / 2, count = v.examples * tiles_h * tiles_w;
  WinogradTiles<S> in = tiles(v.a_h, v.a_w, -v.ph, -v.pw, tiles_h, tiles_w, zeros);
  in.n = in.ld_to = k, in.step = TILES * k;
  WinogradTiles<S> out = tiles(v.b_h, v.b_w, i64(0), i64(0), tiles_h, tiles_w, zeros);
  out.n = out.ld_to = n, out.step = TILES * n, out.ld_from = v.ldb;
  for (i64 begin = 0; begin < count; begin += TILES) {
    const i64 end = std::min(begin + TILES, count);
    in.begin = out.begin = begin, in.end = out.end = end;
    for (int p = 0; p < v.pairs; ++p) {
      in.from = v.pair[p].a, in.ld_from = v.pair[p].lda, in.to = inputs[p];
      kernels.winograd_input(in);
      out.from = v.pair[p].b, out.to = gradients[p];
      kernels.winograd_gradient(out);
    }
    Gemm<S> calls[16];
    for (int i = 0; i < 16; ++i) {
      Gemm<S>& g = calls[i];
      g.m = v.k, g.n = v.n, g.k = end - begin, g.pairs = v.pairs;
      for (int p = 0; p < v.pairs; ++p)
        g.pair[p] = {inputs[p] + i * in.step, 1, k, Matrix<const S>::plain(gradients[p] + i * out.step, n)};
      g.c = Matrix<S>::panels(sums + i * matrix, v.k, n);
      if (begin > 0) g.base = Matrix<const S>::panels(g.c.data, v.k, n);
    }
    kernels.gemms(calls, 16);
  }
  kernels.winograd_weight_gradient({matrix, matrix, matrix, sums, v.c, false, v.base, v.also, v.scale});
}

}  // namespace fm::winograd
