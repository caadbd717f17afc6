// Stands in for warps and tensor cores: the same registers of the same lanes, rounded and summed as
// the hardware does it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fragments.h"

namespace fm::cuda {

constexpr int WARP = 1;   // threads
constexpr int HELD = 32;  // lanes whose registers a thread holds

inline int lane(int held) { return held; }

// The sum of the parts of LANES neighbours, a power of two, for each of them: in the order of a
// butterfly.
template <int LANES, class T>
void add_lanes(T (&part)[LANES]) {
  for (int distance = 1; distance < LANES; distance *= 2) {
    T before[LANES];
    std::memcpy(before, part, sizeof before);
    for (int l = 0; l < LANES; ++l) part[l] = before[l] + before[l ^ distance];
  }
}

inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// To ten bits behind the leading one, ties away from zero: cvt.rna.tf32.f32.
inline unsigned round_to_tf32(float x) {
  return std::isfinite(x) ? (bits_of(x) + 0x1000u) & ~0x1fffu : bits_of(x);
}
// To seven, ties to even: cvt.rn.bf16x2.f32, `low` in the lower half of the register.
inline unsigned round_to_bf16(float x) {
  const unsigned bits = bits_of(x);
  if (std::isnan(x)) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline unsigned round_to_bf16(float low, float high) {
  return round_to_bf16(low) | round_to_bf16(high) << 16;
}

template <int PER>
float part_of(unsigned bits, int part) {
  // what lies below ten bits is not looked at
  return PER == 1 ? float_of(bits & ~0x1fffu) : float_of(part ? bits & 0xffff0000u : bits << 16);
}

// c and products, exact, are cut off 23 bits below the leading bit of the largest of them, summed,
// and the sum is cut off to a float. So V100's do it; later ones keep a bit or two more. Source:
// Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021, table 2.
template <int COUNT>
float cut_off_sum(float c, const double (&products)[COUNT]) {
  double largest = std::fabs(c), plain = c;
  for (double product : products) largest = std::fmax(largest, std::fabs(product)), plain += product;
  if (!std::isfinite(plain) || largest == 0) return float(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  std::int64_t sum = std::int64_t(c / unit);
  for (double product : products) sum += std::int64_t(product / unit);
  const double exact = double(sum) * unit;
  const float rounded = float(exact);
  return std::fabs(double(rounded)) > std::fabs(exact) ? std::nextafter(rounded, 0.0f) : rounded;
}

template <int PER>
void tensor_multiply(float* c, int c_lane, const unsigned* a, int a_lane, const unsigned* b, int b_lane) {
  float x[16][8 * PER], y[8 * PER][8];
  for (int l = 0; l < 32; ++l)
    for (int part = 0; part < PER; ++part) {
      for (int r = 0; r < 4; ++r) {
        const Place at = place_in_a<PER>(l, r, part);
        x[at.row][at.col] = part_of<PER>(a[l * a_lane + r], part);
      }
      for (int r = 0; r < 2; ++r) {
        const Place at = place_in_b<PER>(l, r, part);
        y[at.row][at.col] = part_of<PER>(b[l * b_lane + r], part);
      }
    }
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) {
      const Place at = place_in_c(l, r);
      double products[8 * PER];
      for (int k = 0; k < 8 * PER; ++k) products[k] = double(x[at.row][k]) * double(y[k][at.col]);
      float& to = c[l * c_lane + r];
      to = cut_off_sum(to, products);
    }
}

}  // namespace fm::cuda
