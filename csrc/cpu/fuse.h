// What the plan does to a layer program before anything is laid out: reshapes that move nothing go,
// and layers move into the epilogues of those before them.
#pragma once

#include "plan.h"

namespace fm {

void fuse(Plan& plan);

// Marks convolutions of the input, cheap for its few channels, whose output the norm that reads it
// may recompute.
void choose_recomputed(Plan& plan);

}  // namespace fm
