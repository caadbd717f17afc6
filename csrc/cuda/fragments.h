// Which elements of its operands a lane of a warp holds in `mma.m16n8k8` of TF32 and `mma.m16n8k16`
// of bfloat16, a b + c with a of 16 rows and b of 8 columns. A register of a and b holds PER
// elements: one of TF32, two of bfloat16.
//
// Source: NVIDIA, Parallel Thread Execution ISA 8.x, "Matrix Fragments for mma.m16n8k8", "... for
// mma.m16n8k16".
#pragma once

namespace fm::cuda {

struct Place {
  int row, col;
};

// Element `part` of register 0 .. 3 of a: [16, 8 PER].
template <int PER>
constexpr Place place_in_a(int lane, int reg, int part) {
  return {lane / 4 + reg % 2 * 8, lane % 4 * PER + part + reg / 2 * 4 * PER};
}
// ... of register 0, 1 of b: [8 PER, 8].
template <int PER>
constexpr Place place_in_b(int lane, int reg, int part) {
  return {lane % 4 * PER + part + reg * 4 * PER, lane / 4};
}
// Register 0 .. 3 of c: [16, 8].
constexpr Place place_in_c(int lane, int reg) { return {lane / 4 + reg / 2 * 8, lane % 4 * 2 + reg % 2}; }

}  // namespace fm::cuda
