// Scales and mid points (kernels/small_floats.py): of 8 bits, or float16.
#pragma once

namespace xq {

constexpr float SCALE_UNIT = 1.0f / 32, MID_UNIT = 256.0f, LARGEST_MID = 480.0f;
constexpr float LEAST_NORM = 1.0f / (1 << 19), LARGEST_NORM = 1920.0f;
// From the exponent of a float16 to that of a float.
constexpr float HALF_TO_FLOAT = 5192296858534827628530496329220096.0f;  // 2**112

inline vf load_scales(const uint8_t* p, int64_t n) {
    const vi code = widen(load_bytes(p, n));
    const vf s = (vf)(code << 20) * (HALF_TO_FLOAT * SCALE_UNIT);
    return code >= 0xf8 ? splat(std::numeric_limits<float>::quiet_NaN()) : s;
}
template <class S> inline vf load_scales(const S* p, int64_t n) { return load_up_to(p, n); }

// Token norms, none of which is NaN.
inline vf load_norms(const uint8_t* p, int64_t n) {
    return (vf)(widen(load_bytes(p, n)) << 20) * (HALF_TO_FLOAT * SCALE_UNIT);
}

inline vf load_mids(const uint8_t* p, int64_t n) {
    const vi code = widen(load_bytes(p, n)), low = code & 0x7f;
    // Not as above: the smallest are subnormal, many mids are among them, and processors are slow to multiply them.
    const vf x = (vf)((low << 20) + (112 << 23)) * MID_UNIT, least = splat(MID_UNIT / (1 << 15));
    const vf magnitude = low < 8 ? (x - least) + (x - least) : x;
    return (vf)((vi)magnitude | (code & 0x80) << 24);
}

template <class S> inline vf load_mids(const S* p, int64_t n) { return load_up_to(p, n); }

inline float decode_scale(uint8_t code) { return load_scales(&code, 1)[0]; }
inline float decode_scale(float16 scale) { return to_float(scale); }

// The bits of x >= 0 as a float16 without the last seven, rounded to nearest, halves to even.
inline uint32_t half_without_seven(float x) {
    const uint32_t bits = from_float<float16>(x).bits;
    return (bits + 63 + ((bits >> 7) & 1)) >> 7;
}

// NaN where it is NaN, infinite or too large.
inline void encode_scale(float scale, uint8_t* to) {
    const uint32_t code = half_without_seven(scale / SCALE_UNIT);
    *to = (uint8_t)(code >= 0xf8 ? 0xff : code);
}
inline void encode_scale(float scale, float16* to) {
    *to = from_float<float16>(scale);
    if (to->bits >= 0x7c00) to->bits = 0x7e00;
}

// Never 0; NaN is the largest.
inline void encode_norm(float norm, uint8_t* to) {
    encode_scale(norm < LARGEST_NORM ? std::max(norm, LEAST_NORM) : LARGEST_NORM, to);
}

inline void encode_mid(float mid, uint8_t* to) {
    const uint32_t code = half_without_seven(std::min(std::abs(mid), LARGEST_MID) / MID_UNIT);
    *to = mid != mid ? 0 : (uint8_t)(std::min(code, 0x7fu) | (mid < 0.0f ? 0x80 : 0));
}
inline void encode_mid(float mid, float16* to) {
    *to = from_float<float16>(mid != mid ? 0.0f : std::clamp(mid, -LARGEST_MID, LARGEST_MID));
}

}  // namespace xq
