// Vectors of FM_VECTOR_BYTES bytes by the compilers' vector extension. Included by one file per
// instruction set, inside an anonymous namespace: nothing here may be shared between those files.

#define FM_INLINE inline __attribute__((always_inline))
#define FM_INLINE_LAMBDA __attribute__((always_inline))

template <class S, int BYTES = FM_VECTOR_BYTES>
struct VectorOf {
  typedef S type __attribute__((vector_size(BYTES)));
  typedef S loose __attribute__((vector_size(BYTES), aligned(sizeof(S)), may_alias));
};
template <class S>
using Vec = typename VectorOf<S>::type;

template <class S>
constexpr int lanes = FM_VECTOR_BYTES / sizeof(S);

template <class S>
FM_INLINE Vec<S> load(const S* p) {
  return *reinterpret_cast<const typename VectorOf<S>::loose*>(p);
}
// The first `count` lanes from memory, zeros in the others, whose memory is not touched.
template <class S>
FM_INLINE Vec<S> load_first(const S* p, i64 count) {
  S lane[lanes<S>] = {};
  for (i64 i = 0; i < count; ++i) lane[i] = p[i];
  return load(lane);
}
template <class S>
FM_INLINE void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename VectorOf<S>::loose*>(p) = v;
}
template <class S>
FM_INLINE Vec<S> broadcast(S x) {
  return x - Vec<S>{};
}
// Sum of all lanes, by halves.
template <class S, int BYTES = FM_VECTOR_BYTES>
FM_INLINE S sum(typename VectorOf<S, BYTES>::type v) {
  if constexpr (BYTES == 16) {
    S s = v[0];
    for (int i = 1; i < int(16 / sizeof(S)); ++i) s += v[i];
    return s;
  } else {
    typedef typename VectorOf<S, BYTES / 2>::type Half;
    union {
      typename VectorOf<S, BYTES>::type whole;
      Half half[2];
    } u = {v};
    return sum<S, BYTES / 2>(u.half[0] + u.half[1]);
  }
}

// Zeros in the columns [from, ld) of a padded row.
template <class S>
FM_INLINE void zero_columns(S* row, i64 from, i64 ld) {
  i64 c = from;
  for (; c % lanes<S>; ++c) row[c] = 0;
  for (; c < ld; c += lanes<S>) store(row + c, Vec<S>{});
}
