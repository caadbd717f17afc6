// The transforms of Winograd's F(2x2, 3x3) over vectors of channels; see winograd.h. With
//
//   B^T = 1  0 -1  0     A^T = 1  1  1  0     G = 1    0    0
//         0  1  1  0           0  1 -1 -1         1/2  1/2  1/2
//         0 -1  1  0                              1/2 -1/2  1/2
//         0  1  0 -1                              0    0    1

// out = B^T d
template <class V>
FM_INLINE void winograd_bt(const V d[4], V out[4]) {
  out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
}

// The tile's place in the images.
struct WinogradTile {
  i64 example, y, x;
};
template <class S>
FM_INLINE WinogradTile winograd_tile(const WinogradTiles<S>& t, i64 tile) {
  const i64 row = tile / t.tiles_w, example = row / t.tiles_h;
  return {example, (row - example * t.tiles_h) * 2 + t.top, (tile - row * t.tiles_w) * 2 + t.left};
}

template <class S>
void winograd_input(const WinogradTiles<S>& t) {
  using V = Vec<S>;
  for (i64 tile = t.begin; tile < t.end; ++tile) {
    const WinogradTile at = winograd_tile(t, tile);
    const S* pixel[4][4];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const i64 y = at.y + i, x = at.x + j;
        pixel[i][j] = y < 0 || y >= t.height || x < 0 || x >= t.width
                          ? t.zeros
                          : t.from + ((at.example * t.height + y) * t.width + x) * t.ld_from;
      }
    S* const to = t.to + (tile - t.begin) * t.ld_to;
    for (i64 c = 0; c < t.n; c += lanes<S>) {
      V rows[4][4];  // [column][row of B^T d]
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const V d[4] = {load(pixel[0][j] + c), load(pixel[1][j] + c), load(pixel[2][j] + c),
                        load(pixel[3][j] + c)};
        winograd_bt(d, rows[j]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V row[4] = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
        V out[4];
        winograd_bt(row, out);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(to + (i * 4 + j) * t.step + c, out[j]);
      }
    }
  }
}

template <class S>
void winograd_output(const WinogradTiles<S>& t) {
  using V = Vec<S>;
  for (i64 tile = t.begin; tile < t.end; ++tile) {
    const WinogradTile at = winograd_tile(t, tile);
    const bool second_row = at.y + 1 < t.height, second = at.x + 1 < t.width;
    S* const to = t.to + ((at.example * t.height + at.y) * t.width + at.x) * t.ld_to;
    S* const below = to + t.width * t.ld_to;
    const S* const from = t.from + (tile - t.begin) * t.ld_from;
    for (i64 c = 0; c < t.n; c += lanes<S>) {
      V up[4], down[4];  // rows of A^T m
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const S* m = from + j * t.step + c;
        const V m1 = load(m + 4 * t.step), m2 = load(m + 8 * t.step);
        up[j] = load(m) + m1 + m2, down[j] = m1 - m2 - load(m + 12 * t.step);
      }
      const V bias = t.bias ? load(t.bias + c) : V{};
      const auto put = [&](S* p, V value)
                           FM_INLINE_LAMBDA { store(p, t.add ? load(p) + value : value + bias); };
      put(to + c, up[0] + up[1] + up[2]);
      if (second) put(to + t.ld_to + c, up[1] - up[2] - up[3]);
      if (second_row) put(below + c, down[0] + down[1] + down[2]);
      if (second_row && second) put(below + t.ld_to + c, down[1] - down[2] - down[3]);
    }
  }
}

template <class S>
void winograd_gradient(const WinogradTiles<S>& t) {
  using V = Vec<S>;
  for (i64 tile = t.begin; tile < t.end; ++tile) {
    const WinogradTile at = winograd_tile(t, tile);
    const bool second_row = at.y + 1 < t.height, second = at.x + 1 < t.width;
    const S* const from = t.from + ((at.example * t.height + at.y) * t.width + at.x) * t.ld_from;
    const S* const pixel[4] = {from, second ? from + t.ld_from : t.zeros,
                               second_row ? from + t.width * t.ld_from : t.zeros,
                               second_row && second ? from + (t.width + 1) * t.ld_from : t.zeros};
    S* const to = t.to + (tile - t.begin) * t.ld_to;
    for (i64 c = 0; c < t.n; c += lanes<S>) {
      const V d[4] = {load(pixel[0] + c), load(pixel[1] + c), load(pixel[2] + c), load(pixel[3] + c)};
      const V left[4] = {d[0], d[0] + d[2], d[0] - d[2], -d[2]};  // columns of A d
      const V right[4] = {d[1], d[1] + d[3], d[1] - d[3], -d[3]};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        S* row = to + i * 4 * t.step + c;
        store(row, left[i]), store(row + t.step, left[i] + right[i]);
        store(row + 2 * t.step, left[i] - right[i]), store(row + 3 * t.step, -right[i]);
      }
    }
  }
}

template <class S>
void winograd_weight(const WinogradWeight<S>& w) {
  using V = Vec<S>;
  const V half = broadcast(S(0.5));
  const auto times_g = [&](const V g[3], V out[4]) FM_INLINE_LAMBDA {
    const V ends = g[0] + g[2];
    out[0] = g[0], out[1] = half * (ends + g[1]), out[2] = half * (ends - g[1]), out[3] = g[2];
  };
  for (i64 e = 0; e < w.n; e += lanes<S>) {
    V columns[3][4];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      V g[3];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const int tap = i * 3 + j;
        g[i] = load(w.from + (w.flip ? 8 - tap : tap) * w.step_from + e);
      }
      times_g(g, columns[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V g[3] = {columns[0][i], columns[1][i], columns[2][i]};
      V out[4];
      times_g(g, out);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(w.to + (i * 4 + j) * w.step_to + e, out[j]);
    }
  }
}

template <class S>
void winograd_weight_gradient(const WinogradWeight<S>& w) {
  using V = Vec<S>;
  const V half = broadcast(S(0.5)), scale = broadcast(w.scale);
  const auto times_gt = [&](const V u[4], V out[3]) FM_INLINE_LAMBDA {
    const V sum = half * (u[1] + u[2]);
    out[0] = u[0] + sum, out[1] = half * (u[1] - u[2]), out[2] = sum + u[3];
  };
  for (i64 e = 0; e < w.n; e += lanes<S>) {
    V columns[4][3];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      V u[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) u[i] = load(w.from + (i * 4 + j) * w.step_from + e);
      times_gt(u, columns[j]);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const V u[4] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
      V out[3];
      times_gt(u, out);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const i64 at = (i * 3 + j) * w.step_to + e;
        V sum = scale * out[j];
        if (w.base) sum += load(w.base + at);
        if (w.also) sum += load(w.also + at);
        store(w.to + at, sum);
      }
    }
  }
}
