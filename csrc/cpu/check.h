// What a plan must be before anything is made of it.
#pragma once

#include "plan.h"
#include "rules.h"

namespace fm {

// Throws std::invalid_argument, which names the field that is wrong: sizes, the order of the
// layers, their inputs, parameters and constants, options.
void check(const Plan& plan);

// The same for what every layer asks of the shapes of its values and parameters.
void check_layers(const Plan& plan);

// What a layer kind takes, and its name.
Rules rules(Kind kind);
const char* name_of(Kind kind);

// Throws std::invalid_argument where what is done together cannot be, or is described wrongly.
void check_fused(const Plan& plan);

// Sums and products of sizes; std::invalid_argument where there is no such number.
i64 plus(i64 a, i64 b);
i64 times(i64 a, i64 b);

}  // namespace fm
