// All kernels of one instruction set. The including file defines FM_ISA, FM_ISA_NAME,
// FM_EXECUTORS, FM_VECTOR_BYTES and FM_REGISTERS, and is compiled with that instruction set's flags.
// Everything is in an anonymous namespace, and no standard header is included: an inline function compiled
// for AVX-512 must never be linked into portable code.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace fm {
namespace {

#include "vector.inl"
// vector.inl comes first, the others build on it
#include "vector_math.inl"
// and then
#include "vector_activations.inl"

#include "columns.inl"
#include "gemm_tile.inl"

// what other backends compute too
#include "../shared/functions.inl"
#include "../shared/loss_example.inl"

#include "elementary.inl"
#include "layers/conv2d.inl"
#include "layers/elementwise.inl"
#include "layers/layer_norm.inl"
#include "loss.inl"
#include "parameters.inl"
#include "peak.inl"
#include "pool.inl"
#include "pooled_columns.inl"
#include "transpose.inl"
#include "winograd.inl"

#include "update_rules/rule.inl"
// the rules build on it
#include "../shared/update_rules/decay.inl"
// and on that
#include "../shared/update_rules/adagrad.inl"
#include "../shared/update_rules/adam.inl"
#include "../shared/update_rules/lion.inl"
#include "../shared/update_rules/rmsprop.inl"
#include "../shared/update_rules/sgd.inl"
#include "update_rules/clip.inl"
// and the choice between them on these
#include "update_rules/kinds.inl"

template <class S>
constexpr Kernels<S> KERNELS = {&gemm<S>,
                                &gemms<S>,
                                &dot<S>,
                                &transpose<S>,
                                &elementwise_forward<S>,
                                &elementwise_backward<S>,
                                &elementwise_tangent<S>,
                                &elementwise_tangent_backward<S>,
                                &loss<S>,
                                &loss_tangent<S>,
                                &add<S>,
                                &inner<S>,
                                &column_sums<S>,
                                &column_squares<S>,
                                &column_products<S>,
                                &column_combination<S>,
                                &pooled_forward<S>,
                                &pooled_pick<S>,
                                &pooled_combination<S>,
                                &elementary<S>,
                                &layer_norm_forward<S>,
                                &layer_norm_backward<S>,
                                &layer_norm_tangent<S>,
                                &layer_norm_tangent_backward<S>,
                                &max_pool_forward<S>,
                                &max_pool_gather<S>,
                                &max_pool_scatter<S>,
                                &avg_pool_gather<S>,
                                &avg_pool_scatter<S>,
                                &conv<S>,
                                &conv_weight<S>,
                                &winograd_input<S>,
                                &winograd_output<S>,
                                &winograd_gradient<S>,
                                &winograd_weight<S>,
                                &winograd_weight_gradient<S>,
                                &sgd_update<S>,
                                &sgd_direction<S>,
                                &run_rule<S, false>,
                                &run_rule<S, true>,
                                &clip_squares<S>,
                                &clip<S>,
                                &clip_dots<S>,
                                &clip_back<S>};

}  // namespace

namespace machine {
extern const Executors FM_EXECUTORS;
}
extern const InstructionSet FM_ISA;
const InstructionSet FM_ISA = {FM_ISA_NAME,   &KERNELS<float>, &KERNELS<double>,      &peak<float>,
                               &peak<double>, FM_VECTOR_BYTES, &machine::FM_EXECUTORS};

}  // namespace fm
