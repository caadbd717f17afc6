// rms_norm: the last dimensions of each example divided by the root of their mean square.
#pragma once

#include "layer_norm.h"

namespace fm::cuda::rms_norm {

template <int L>
using Functions = Norm<layer_norm::Groups<L>, L, /*CENTRED=*/false>;

}  // namespace fm::cuda::rms_norm
