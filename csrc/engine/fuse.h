// What the plan does to a layer program before anything is laid out: reshapes that move nothing go, and layers move
// into the epilogues of those before them.
#pragma once

#include "plan.h"

namespace fm {

void fuse(Plan& plan);

}  // namespace fm
