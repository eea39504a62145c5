// Any processor: vectors of 4 lanes in nothing but the compiler's vector extension.
//
// To add an ISA: copy this file to simd_<isa>.h, write intrinsics where the compiler's code is poor, and keep all
// names; give it a branch in simd.h and a row in isa.py. tests/test_cpu_neon.py shows how to run it without the
// processor, tests/avx512.h how to spell out its intrinsics.
//
// What each ISA's header defines:
//   REGISTERS                 how many vectors the processor holds
//   multiply_add_pairs, add_pairs
//                             for sums of codes times digits; or XQ_DOT_BYTES and dot_bytes, see simd_neon.h
//                             with XQ_SPREAD_DIGITS where an instruction reads digits from memory, but repeats none
//                             (add_pairs takes a weight, too)
//   fma, sum, max, any        arithmetic
//   dot_bfloat16, round_to_bfloat16
//                             with XQ_DOT_BFLOAT16; or nothing, and bfloat16 numbers are multiplied as floats
//   four_across               of four vectors at once, with XQ_FOUR_ACROSS; or nothing, and simd.h takes one by one
//   widen, narrow             between bytes and lanes
//   pack_ints, pack_shorts    with XQ_PACK; or nothing, and narrow is called for each vector
//   round_to_int, exp_negative
//   load_floats               of float16
#pragma once
#define XQ_LANES 4
#include "vectors.h"

namespace xq {

constexpr int REGISTERS = 16;

// Codes (unsigned bytes) times digits (signed bytes), two neighbours added: at most 32,767 for codes of 7 bits.
inline vs multiply_add_pairs(vi code, vi digit) {
    const vs even = (vs)(code & 0x00ff00ff), odd = (vs)((code >> 8) & 0x00ff00ff);
    return even * ((vs)(digit << 8) >> 8) + odd * ((vs)digit >> 8);
}

// The two numbers of each lane added.
inline vi add_pairs(vs x) { return (((vi)x << 16) >> 16) + ((vi)x >> 16); }

inline vf fma(vf a, vf b, vf c) { return a * b + c; }

inline float sum(vf x) {
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

inline float max(vf x) {
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

// b where either is NaN.
inline vf max(vf a, vf b) { return a > b ? a : b; }

inline bool any(vi mask) {
    int32_t all = 0;
    for (int i = 0; i < L; i++) all |= mask[i];
    return all != 0;
}

inline vi widen(vub x) { return __builtin_convertvector(x, vi); }
inline vi widen(vh x) { return __builtin_convertvector(x, vi); }
inline vb narrow(vi x) { return __builtin_convertvector(x, vb); }

// Nearest integer, |x| < 2**22; NaN gives some integer.
inline vi round_to_int(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2**23
    return (vi)(x + magic) - (vi)magic;
}

// exp where x <= 0; APPROXIMATE may be off by up to 3e-6 of the result.
template <bool APPROXIMATE> inline vf exp_negative(vf x) { return exp(x); }

inline vf load_floats(const float16* p) {
    vf v;
    for (int i = 0; i < L; i++) v[i] = to_float(p[i]);
    return v;
}

}  // namespace xq
