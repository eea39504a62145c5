// AVX-512: vectors of 16 lanes. Inductor's has F, DQ, VL and BW; VNNI where the processor has it.
//
// To add an ISA: copy simd_portable.h, which says what each name means.
#pragma once
#include <immintrin.h>
#define XQ_LANES 16
#include "vectors.h"

namespace xq {

constexpr int REGISTERS = 32;

#ifdef __AVX512VNNI__
#define XQ_DOT_BYTES
template <int BITS> inline vi dot_bytes(vi sum, vi code, vi digit) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)code, (__m512i)digit);
}
#else
inline vs multiply_add_pairs(vi code, vi digit) { return (vs)_mm512_maddubs_epi16((__m512i)code, (__m512i)digit); }
inline vi add_pairs(vs x) { return (vi)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1)); }
#endif

#ifdef __AVX512BF16__
#define XQ_DOT_BFLOAT16
// sum + a . b of bfloat16 numbers, two to a lane.
inline vf dot_bfloat16(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
// a and then b as bfloat16 numbers.
inline vi round_to_bfloat16(vf a, vf b) { return (vi)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
#endif

inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
inline float max(vf x) { return _mm512_reduce_max_ps((__m512)x); }
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }

// The sums, or by `f` whatever else, across the lanes of four vectors: four lanes, and the same in each quarter.
#define XQ_FOUR_ACROSS
template <class F> inline vf four_across(F f, vf a, vf b, vf c, vf d) {
    const vf ab = f((vf)_mm512_unpacklo_ps((__m512)a, (__m512)b), (vf)_mm512_unpackhi_ps((__m512)a, (__m512)b));
    const vf cd = f((vf)_mm512_unpacklo_ps((__m512)c, (__m512)d), (vf)_mm512_unpackhi_ps((__m512)c, (__m512)d));
    const vi low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, high = low + 2;
    vf x = f((vf)_mm512_permutex2var_ps((__m512)ab, (__m512i)low, (__m512)cd),
             (vf)_mm512_permutex2var_ps((__m512)ab, (__m512i)high, (__m512)cd));
    x = f(x, (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e));
    return f(x, (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1));
}
inline bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

// Compilers take what __builtin_convertvector says here apart into scalars.
inline vi widen(vub x) { return (vi)_mm512_cvtepu8_epi32((__m128i)x); }
inline vi widen(vh x) { return (vi)_mm512_cvtepu16_epi32((__m256i)x); }
inline vb narrow(vi x) { return (vb)_mm512_cvtepi32_epi8((__m512i)x); }

// Pairs of vectors as one of half the width: of ints as shorts, in the order of the next, of those as bytes, in order.
#define XQ_PACK
inline vs pack_ints(vi a, vi b) { return (vs)_mm512_packs_epi32((__m512i)a, (__m512i)b); }
inline vi pack_shorts(vs a, vs b) {
    const vi order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return (vi)_mm512_permutexvar_epi32((__m512i)order, _mm512_packs_epi16((__m512i)a, (__m512i)b));
}

inline vi round_to_int(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }

template <bool APPROXIMATE> inline vf exp_negative(vf x) {
    const vf y = max(splat(-104.0f), x), t = y * LOG2_OF_E;
    const vf n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm512_scalef_ps((__m512)(APPROXIMATE ? exp2_of_remainder(t - n) : exp_of_remainder(y, n)), (__m512)n);
}

inline vf load_floats(const float16* p) { return (vf)_mm512_cvtph_ps((__m256i)load<vh>(p)); }

}  // namespace xq
