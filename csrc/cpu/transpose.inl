// Transposition through registers, block by block. Blocks are at most 32 bytes wide: two 128-bit
// halves are loaded where they belong, so that all shuffles stay inside 128-bit lanes.

#if defined(__AVX2__)
FM_INLINE __m256 halves(const float* low, const float* high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
FM_INLINE __m256d halves(const double* low, const double* high) {
  return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(low)), _mm_loadu_pd(high), 1);
}

template <class S>
constexpr int block_side = 32 / sizeof(S);

// dst[c, r] = src[r, c] for a whole block.
FM_INLINE void transpose_block(const float* src, i64 ld_src, float* dst, i64 ld_dst) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const float* p = src + 4 * h;
    const __m256 a = halves(p, p + 4 * ld_src), b = halves(p + ld_src, p + 5 * ld_src);
    const __m256 c = halves(p + 2 * ld_src, p + 6 * ld_src), d = halves(p + 3 * ld_src, p + 7 * ld_src);
    const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
    const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
    float* q = dst + 4 * h * ld_dst;
    _mm256_storeu_ps(q, _mm256_shuffle_ps(ab0, cd0, 0x44));
    _mm256_storeu_ps(q + ld_dst, _mm256_shuffle_ps(ab0, cd0, 0xee));
    _mm256_storeu_ps(q + 2 * ld_dst, _mm256_shuffle_ps(ab1, cd1, 0x44));
    _mm256_storeu_ps(q + 3 * ld_dst, _mm256_shuffle_ps(ab1, cd1, 0xee));
  }
}
FM_INLINE void transpose_block(const double* src, i64 ld_src, double* dst, i64 ld_dst) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const double* p = src + 2 * h;
    const __m256d a = halves(p, p + 2 * ld_src), b = halves(p + ld_src, p + 3 * ld_src);
    _mm256_storeu_pd(dst + 2 * h * ld_dst, _mm256_unpacklo_pd(a, b));
    _mm256_storeu_pd(dst + (2 * h + 1) * ld_dst, _mm256_unpackhi_pd(a, b));
  }
}
#else
template <class S>
constexpr int block_side = 4;

template <class S>
FM_INLINE void transpose_block(const S* src, i64 ld_src, S* dst, i64 ld_dst) {
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) dst[c * ld_dst + r] = src[r * ld_src + c];
}
#endif

// The same for a row of blocks of src, one below the other in dst. Not inlined: it needs all
// general registers.
template <class S>
__attribute__((noinline)) void transpose_strip(const S* src, i64 ld_src, S* dst, i64 ld_dst, i64 blocks) {
  constexpr int B = block_side<S>;
  for (; blocks > 0; --blocks) {
    transpose_block(src, ld_src, dst, ld_dst);
    src += B;
    dst += B * ld_dst;
  }
}

// What no whole block covers: height x width elements; a padded destination gets zeros up to a
// whole block.
template <class S>
__attribute__((noinline)) void transpose_edge(const S* src, i64 ld_src, S* dst, i64 ld_dst, i64 height,
                                              i64 width, bool pad_dst) {
  constexpr int B = block_side<S>;
  for (i64 c = 0; c < width; ++c) {
    for (i64 r = 0; r < height; ++r) dst[c * ld_dst + r] = src[r * ld_src + c];
    if (pad_dst)
      for (i64 r = height; r < B; ++r) dst[c * ld_dst + r] = 0;
  }
}

template <class S>
void transpose(const Transpose<S>& t) {
  constexpr int B = block_side<S>;
  constexpr i64 PANEL = panel_columns<S>;
  // Panels of src by panels of dst: inside, all strides are constant.
  for (i64 pc = 0; pc < t.cols; pc += PANEL) {
    const i64 cols = t.cols - pc < PANEL ? t.cols - pc : PANEL, whole = cols / B * B;
    i64 ld_src;
    const S* const src = t.src.column(pc, ld_src);
    for (i64 pr = 0; pr < t.rows; pr += PANEL) {
      const i64 rows = t.rows - pr < PANEL ? t.rows - pr : PANEL;
      i64 ld_dst;
      S* const dst = t.dst.column(pr, ld_dst) + pc * ld_dst;
      i64 r = 0;
      for (; r < rows; r += B) {
        const i64 height = rows - r < B ? rows - r : B;
        const S* const from = src + (pr + r) * ld_src;
        if (height == B) transpose_strip(from, ld_src, dst + r, ld_dst, cols / B);
        const i64 done = height == B ? whole : 0;
        if (done < cols)
          transpose_edge(from + done, ld_src, dst + done * ld_dst + r, ld_dst, height, cols - done,
                         t.dst_padded);
      }
      // A padded destination is padded to 64 bytes, which may be further than the blocks reach.
      if (t.dst_padded)
        for (; r < pad<S>(rows); r += B)
          for (i64 c = 0; c < cols; ++c)
            for (int i = 0; i < B; ++i) dst[c * ld_dst + r + i] = 0;
    }
  }
}
