// NEON of 64-bit ARM: vectors of 4 lanes; dot products of bytes where the processor has them.
//
// To add an ISA: copy simd_portable.h, which says what each name means. An ISA that adds four products of bytes to
// a lane at once defines XQ_DOT_BYTES and dot_bytes instead of the two functions of pairs.
#pragma once
#include <arm_neon.h>
#define XQ_LANES 4
#include "vectors.h"

namespace xq {

constexpr int REGISTERS = 32;

#ifdef __ARM_FEATURE_DOTPROD
#define XQ_DOT_BYTES
template <int BITS> inline vi dot_bytes(vi sum, vi code, vi digit) {
    if constexpr (BITS < 8) {  // as a signed byte, too, the code is what it is
        return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)code, (int8x16_t)digit);
    } else {  // a nibble at a time
        const vi low = splat(0x0f0f0f0f);
        const vi high = (vi)vdotq_s32(vdupq_n_s32(0), (int8x16_t)((code >> 4) & low), (int8x16_t)digit);
        return (vi)vdotq_s32((int32x4_t)(sum + (high << 4)), (int8x16_t)(code & low), (int8x16_t)digit);
    }
}
#else
inline vs multiply_add_pairs(vi code, vi digit) {
    const int8x16_t a = (int8x16_t)code, b = (int8x16_t)digit;
    return (vs)vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
}
inline vi add_pairs(vs x) { return (vi)vpaddlq_s16((int16x8_t)x); }
#endif

inline vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline float sum(vf x) { return vaddvq_f32((float32x4_t)x); }
inline float max(vf x) { return vmaxnmvq_f32((float32x4_t)x); }
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline bool any(vi mask) { return vmaxvq_u32((uint32x4_t)mask) != 0; }

inline vi widen(vub x) {
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(load<uint32_t>(&x)));
    return (vi)vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
}
inline vi widen(vh x) { return (vi)vmovl_u16((uint16x4_t)x); }
inline vb narrow(vi x) {
    const int16x4_t shorts = vmovn_s32((int32x4_t)x);
    const int32_t all = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(shorts, shorts))), 0);
    return load<vb>(&all);
}

inline vi round_to_int(vf x) { return (vi)vcvtnq_s32_f32((float32x4_t)x); }

template <bool APPROXIMATE> inline vf exp_negative(vf x) {
    const vf lowest = splat(-87.0f), y = max(lowest, x), t = y * LOG2_OF_E;
    const vf n = (vf)vrndnq_f32((float32x4_t)t);
    const vf p = APPROXIMATE ? exp2_of_remainder(t - n) : exp_of_remainder(y, n);
    const vf scaled = p * (vf)((round_to_int(n) + 127) << 23);
    return x < lowest ? splat(0.0f) : scaled;
}

inline vf load_floats(const float16* p) { return (vf)vcvt_f32_f16(vld1_f16((const __fp16*)p)); }

}  // namespace xq
