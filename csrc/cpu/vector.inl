// Vectors of FM_VECTOR_BYTES bytes by the compilers' vector extension. Included by one file per instruction set,
// inside an anonymous namespace: nothing here may be shared between those files.

#define FM_INLINE inline __attribute__((always_inline))

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(FM_VECTOR_BYTES), aligned(4), may_alias));
  typedef int mask __attribute__((vector_size(FM_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(FM_VECTOR_BYTES), aligned(8), may_alias));
  typedef long long mask __attribute__((vector_size(FM_VECTOR_BYTES)));
};
template <class S>
using Vec = typename VectorOf<S>::type;

template <class S>
constexpr int lanes = FM_VECTOR_BYTES / sizeof(S);

template <class S>
FM_INLINE Vec<S> load(const S* p) {
  return *reinterpret_cast<const typename VectorOf<S>::loose*>(p);
}
template <class S>
FM_INLINE void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename VectorOf<S>::loose*>(p) = v;
}
template <class S>
FM_INLINE Vec<S> broadcast(S x) {
  return x - Vec<S>{};
}
template <class S>
FM_INLINE S sum(Vec<S> v) {
  S s = 0;
  for (int i = 0; i < lanes<S>; ++i) s += v[i];
  return s;
}
