// Convolutions as implicit products: a tile of output pixels walks over the taps, every pixel with
// a pointer to the row of channels that the tap reads, or to zeros where it falls into the padding.
// See Conv in cpu/kernels.h.
//
// The order of every sum is fixed by the shapes and the instruction set: pixels are cut into tiles
// from the first on.

constexpr int CONV_VECTORS = 2;
constexpr int CONV_ROWS = FM_REGISTERS == 32 ? 12 : 6;
constexpr int CONV_TAPS = 16;  // whose pointers are collected before a tile runs

template <class S>
struct ConvTile {
  int pairs, taps;
  i64 k, ldw;
  const S* const* a[2];  // [taps][rows]
  const S* const* w[2];  // [taps]
  S* const* c;           // [rows]
  i64 column;            // of c
  bool add;
  const S* bias;
};

template <class S, int MR, int NV>
__attribute__((noinline)) void conv_tile(const ConvTile<S>& t) {
  using V = Vec<S>;
  constexpr int L = lanes<S>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  for (int p = 0; p < t.pairs; ++p)
    for (int tap = 0; tap < t.taps; ++tap) {
      const S* rows[MR];
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) rows[r] = t.a[p][tap * MR + r];
      const S* w = t.w[p][tap] + t.column;
      for (i64 k = 0; k < t.k; ++k, w += t.ldw) {
        V wv[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) wv[v] = load(w + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
          const V av = broadcast(rows[r][k]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[r][v] += av * wv[v];
        }
      }
    }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const V bias = t.bias ? load(t.bias + t.column + v * L) : V{};
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      S* c = t.c[r] + t.column + v * L;
      store(c, t.add ? load(c) + acc[r][v] : acc[r][v] + bias);
    }
  }
}

template <class S>
using ConvTileFunction = void (*)(const ConvTile<S>&);
#if FM_REGISTERS == 32
#define FM_CONV_ROWS(NV)                                                                      \
  &conv_tile<S, 1, NV>, &conv_tile<S, 2, NV>, &conv_tile<S, 3, NV>, &conv_tile<S, 4, NV>,     \
      &conv_tile<S, 5, NV>, &conv_tile<S, 6, NV>, &conv_tile<S, 7, NV>, &conv_tile<S, 8, NV>, \
      &conv_tile<S, 9, NV>, &conv_tile<S, 10, NV>, &conv_tile<S, 11, NV>, &conv_tile<S, 12, NV>
#else
#define FM_CONV_ROWS(NV)                                                                  \
  &conv_tile<S, 1, NV>, &conv_tile<S, 2, NV>, &conv_tile<S, 3, NV>, &conv_tile<S, 4, NV>, \
      &conv_tile<S, 5, NV>, &conv_tile<S, 6, NV>
#endif
template <class S>
constexpr ConvTileFunction<S> CONV_TILES[CONV_VECTORS][CONV_ROWS] = {{FM_CONV_ROWS(1)}, {FM_CONV_ROWS(2)}};

// A pixel of c: its example and place.
struct Pixel {
  i64 example, y, x;
};

// The taps that some of a tile's pixels read, up to CONV_TAPS of them, and where.
template <class S>
struct ConvTaps {
  int count = 0;
  const S* a[2][CONV_TAPS * CONV_ROWS];
  const S* w[2][CONV_TAPS];
};

// Where tap (i, j) of the pixel's window lies in a, as a number of rows; -1: in the padding, or
// between strides.
template <class S>
FM_INLINE i64 tapped(const Conv<S>& v, const Pixel& at, i64 i, i64 j) {
  i64 y, x;
  if (v.transposed) {
    y = at.y + v.ph - i, x = at.x + v.pw - j;
    if (y < 0 || x < 0) return -1;
    if (v.sh > 1) {
      if (y % v.sh) return -1;
      y /= v.sh;
    }
    if (v.sw > 1) {
      if (x % v.sw) return -1;
      x /= v.sw;
    }
  } else {
    y = at.y * v.sh - v.ph + i, x = at.x * v.sw - v.pw + j;
    if (y < 0 || x < 0) return -1;
  }
  return y < v.a_h && x < v.a_w ? (at.example * v.a_h + y) * v.a_w + x : -1;
}

template <class S>
FM_INLINE void conv_pixels(const Conv<S>& v, const Pixel* pixels, int rows) {
  constexpr int L = lanes<S>;
  S* c[CONV_ROWS];
  for (int r = 0; r < rows; ++r)
    c[r] = v.c + ((pixels[r].example * v.c_h + pixels[r].y) * v.c_w + pixels[r].x) * v.ldc;
  const i64 padded = pad<S>(v.n), tap_size = v.k * padded;
  ConvTaps<S> taps;
  bool added = v.add;
  const auto flush = [&] {
    for (i64 panel = 0; panel < v.n; panel += panel_columns<S>) {
      const i64 left = padded - panel, ldw = left < panel_columns<S> ? left : panel_columns<S>;
      const i64 end = v.n - panel < panel_columns<S> ? v.n - panel : panel_columns<S>;
      const S* w[2][CONV_TAPS];
      for (int p = 0; p < v.pairs; ++p)
        for (int t = 0; t < taps.count; ++t) w[p][t] = taps.w[p][t] + panel * v.k;
      S* to[CONV_ROWS];
      for (int r = 0; r < rows; ++r) to[r] = c[r] + panel;
      ConvTile<S> tile{v.pairs,      taps.count, v.k, ldw,   {taps.a[0], taps.a[1]},
                       {w[0], w[1]}, to,         0,   added, added || !v.bias ? nullptr : v.bias + panel};
      for (i64 j = 0; j < end;) {
        const int vectors = end - j > L ? CONV_VECTORS : 1;
        tile.column = j;
        CONV_TILES<S>[vectors - 1][rows - 1](tile);
        j += vectors * L;
      }
    }
    taps.count = 0, added = true;
  };
  for (i64 i = 0; i < v.kh; ++i)
    for (i64 j = 0; j < v.kw; ++j) {
      // Sums are cut at fixed taps: which other taps the tile reads, and so which pixels share it,
      // changes no bits.
      if (taps.count > 0 && (i * v.kw + j) % CONV_TAPS == 0) flush();
      const int t = taps.count;
      bool any = false;
      for (int r = 0; r < rows; ++r) {
        const i64 row = tapped(v, pixels[r], i, j);
        any = any || row >= 0;
        for (int p = 0; p < v.pairs; ++p)
          taps.a[p][t * rows + r] = row < 0 ? v.zeros : v.pair[p].a + row * v.pair[p].lda;
      }
      if (!any) continue;
      for (int p = 0; p < v.pairs; ++p) taps.w[p][t] = v.pair[p].w + (i * v.kw + j) * tap_size;
      ++taps.count;
    }
  if (taps.count > 0 || !added) flush();
  const i64 written = (v.n + L - 1) / L * L;
  for (int r = 0; r < rows; ++r) zero_columns(c[r], written, v.ldc);
}

// Pixels that lie a stride apart read the same taps of a transposed convolution: they make up tiles
// together.
template <class S>
void conv(const Conv<S>& v) {
  const i64 step_y = v.transposed ? v.sh : 1, step_x = v.transposed ? v.sw : 1;
  Pixel pixels[CONV_ROWS];
  int rows = 0;
  for (i64 phase_y = 0; phase_y < step_y; ++phase_y)
    for (i64 phase_x = 0; phase_x < step_x; ++phase_x) {
      for (i64 n = 0; n < v.examples; ++n)
        for (i64 y = phase_y; y < v.c_h; y += step_y)
          for (i64 x = phase_x; x < v.c_w; x += step_x) {
            pixels[rows++] = {n, y, x};
            if (rows == CONV_ROWS) conv_pixels(v, pixels, rows), rows = 0;
          }
      if (rows > 0) conv_pixels(v, pixels, rows), rows = 0;
    }
}

// ---- the weight's gradient

// A run of pixels: rows of a and of dy, one step apart each.
template <class S>
struct Run {
  const S *a, *b;
  i64 count, a_step, b_step;
};
constexpr i64 RUN_PIXELS =
    FM_REGISTERS == 32 ? 64 : 48;  // whose rows of 64 channels stay in the first-level cache
constexpr int RUNS = 128;

template <class S>
struct WeightTile {
  const Run<S>* runs;
  int count;
  i64 row, column;  // channels of a and of dy
  S* c;
  const S *base, *also;
  i64 ldc;
  S scale;
};

template <class S, int MR, int NV>
__attribute__((noinline)) void weight_tile(const WeightTile<S>& t) {
  using V = Vec<S>;
  constexpr int L = lanes<S>;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  for (int run = 0; run < t.count; ++run) {
    const S* a = t.runs[run].a + t.row;
    const S* b = t.runs[run].b + t.column;
    const i64 a_step = t.runs[run].a_step, b_step = t.runs[run].b_step;
    for (i64 k = t.runs[run].count; k > 0; --k) {
      V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const V av = broadcast(a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] += av * bv[v];
      }
      a += a_step, b += b_step;
    }
  }
  const V scale = broadcast(t.scale);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const i64 at = r * t.ldc + v * L;
      V sum = acc[r][v] * scale;
      if (t.base) sum += load(t.base + at);
      if (t.also) sum += load(t.also + at);
      store(t.c + at, sum);
    }
}

template <class S>
using WeightTileFunction = void (*)(const WeightTile<S>&);
#if FM_REGISTERS == 32
#define FM_WEIGHT_ROWS(NV)                                                                            \
  &weight_tile<S, 1, NV>, &weight_tile<S, 2, NV>, &weight_tile<S, 3, NV>, &weight_tile<S, 4, NV>,     \
      &weight_tile<S, 5, NV>, &weight_tile<S, 6, NV>, &weight_tile<S, 7, NV>, &weight_tile<S, 8, NV>, \
      &weight_tile<S, 9, NV>, &weight_tile<S, 10, NV>, &weight_tile<S, 11, NV>, &weight_tile<S, 12, NV>
#else
#define FM_WEIGHT_ROWS(NV)                                                                        \
  &weight_tile<S, 1, NV>, &weight_tile<S, 2, NV>, &weight_tile<S, 3, NV>, &weight_tile<S, 4, NV>, \
      &weight_tile<S, 5, NV>, &weight_tile<S, 6, NV>
#endif
template <class S>
constexpr WeightTileFunction<S> WEIGHT_TILES[CONV_VECTORS][CONV_ROWS] = {{FM_WEIGHT_ROWS(1)},
                                                                         {FM_WEIGHT_ROWS(2)}};

// c = [base +] [also +] scale * (what the runs sum up to), for one tap's matrix [k, n] in panels.
template <class S>
FM_INLINE void weight_matrix(const ConvWeight<S>& v, const Run<S>* runs, int count, bool first, S* c,
                             const S* base, const S* also) {
  constexpr int L = lanes<S>;
  const i64 padded = pad<S>(v.n), tiles = (v.k + CONV_ROWS - 1) / CONV_ROWS, rows = v.k / tiles,
            larger = v.k % tiles;
  for (i64 panel = 0; panel < v.n; panel += panel_columns<S>) {
    const i64 left = padded - panel, ldc = left < panel_columns<S> ? left : panel_columns<S>;
    const i64 end = v.n - panel < panel_columns<S> ? v.n - panel : panel_columns<S>;
    for (i64 j = 0; j < end;) {
      const int vectors = end - j > L ? CONV_VECTORS : 1;
      i64 row = 0;
      for (i64 i = 0; i < tiles; ++i) {
        const i64 height = rows + (i < larger), at = panel * v.k + row * ldc + j;
        WeightTile<S> t{runs, count, row, panel + j, c + at, nullptr, nullptr, ldc, v.scale};
        if (!first)
          t.base = t.c;
        else
          t.base = base ? base + at : nullptr, t.also = also ? also + at : nullptr;
        WEIGHT_TILES<S>[vectors - 1][height - 1](t);
        row += height;
      }
      j += vectors * L;
    }
    const i64 written = (end + L - 1) / L * L;
    if (first && written < ldc)
      for (i64 r = 0; r < v.k; ++r) zero_columns(c + panel * v.k + r * ldc, written, ldc);
  }
}

// The run of row y of example n under tap (i, j), if there is one.
template <class S>
FM_INLINE bool run_of(const ConvWeight<S>& v, int pair, i64 n, i64 y, i64 i, i64 j, Run<S>& run) {
  const i64 a_y = y * v.sh - v.ph + i;
  if (a_y < 0 || a_y >= v.a_h) return false;
  // 0 <= x sw - pw + j < a_w
  i64 low = 0, high = v.b_w;
  while (low < high && low * v.sw - v.pw + j < 0) ++low;
  while (high > low && (high - 1) * v.sw - v.pw + j >= v.a_w) --high;
  if (low == high) return false;
  const auto& from = v.pair[pair];
  run.a = from.a + ((n * v.a_h + a_y) * v.a_w + low * v.sw - v.pw + j) * from.lda;
  run.b = from.b + ((n * v.b_h + y) * v.b_w + low) * v.ldb;
  run.count = high - low, run.a_step = v.sw * from.lda, run.b_step = v.ldb;
  return true;
}

template <class S>
void conv_weight(const ConvWeight<S>& v) {
  const i64 matrix = v.k * pad<S>(v.n), rows = v.examples * v.b_h;
  const i64 block = RUN_PIXELS / v.b_w < 1          ? 1
                    : RUN_PIXELS / v.b_w > RUNS / 2 ? RUNS / 2
                                                    : RUN_PIXELS / v.b_w;
  Run<S> runs[RUNS];
  for (i64 start = 0; start < rows; start += block) {
    const i64 stop = start + block < rows ? start + block : rows;
    for (i64 tap = v.first_tap; tap < v.last_tap; ++tap) {
      int count = 0;
      for (int p = 0; p < v.pairs; ++p)
        for (i64 r = start; r < stop; ++r)
          count += run_of(v, p, r / v.b_h, r % v.b_h, tap / v.kw, tap % v.kw, runs[count]);
      if (count == 0 && start > 0) continue;
      const i64 at = tap * matrix;
      weight_matrix(v, runs, count, start == 0, v.c + at, v.base ? v.base + at : nullptr,
                    v.also ? v.also + at : nullptr);
    }
  }
}
