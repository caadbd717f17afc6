// Runs instructions in their order, for one task, or for one task in every lane. The including file
// defines FM_EXECUTORS, FM_VECTOR_BYTES and FM_REGISTERS; as in kernels.inl no standard header is
// included.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../kernels.h"

namespace fm {
namespace {

#include "../vector.inl"
// vector.inl comes first, the others build on it
#include "../transpose.inl"
#include "../vector_math.inl"

template <class S>
using VecMask = decltype(Vec<S>{} < Vec<S>{});

#include "vector_functions.inl"

#include "gather.inl"
#include "map.inl"
#include "product.inl"
#include "reduce.inl"

template <class S, bool LANES>
void machine_run(const machine::Step* steps, i64 count, machine::Memory<S>& memory) {
  using machine::StepKind;
  for (i64 i = 0; i < count; ++i) {
    const machine::Step& s = steps[i];
    switch (s.kind) {
      case StepKind::map:
        run_map(s, memory);
        break;
      case StepKind::reduce:
        run_reduce(s, memory);
        break;
      case StepKind::product:
        run_product<S, LANES>(s, memory);
        break;
      case StepKind::gather:
        run_gather<S, false>(s, memory);
        break;
      case StepKind::scatter:
        run_gather<S, true>(s, memory);
        break;
    }
  }
}

// out[i] (+)= the sum over the lanes of x[i].
template <class S>
void lane_sums(i64 n, const S* x, S* out) {
  constexpr int L = lanes<S>;
  for (i64 i = 0; i < n; ++i) out[i] += sum<S>(load(x + i * L));
}

template <class S>
constexpr machine::Executor<S> EXECUTOR = {&machine_run<S, false>, &machine_run<S, true>, &lane_sums<S>,
                                           &add_rows<S>};

}  // namespace

namespace machine {
extern const Executors FM_EXECUTORS;
const Executors FM_EXECUTORS = {EXECUTOR<float>, EXECUTOR<double>};
}  // namespace machine

}  // namespace fm
