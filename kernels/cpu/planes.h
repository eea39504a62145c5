// Where codes are in their words (kernels/packing.py), of which kernels know PLANES, BITS, D and WRAP.
#pragma once

namespace xq {

// Where the codes of token t are: those of a sliding window start over (kernels/layout.py).
constexpr int64_t slot_of(int64_t t) { return WRAP ? t % (WRAP ? WRAP : 1) : t; }

// Where code i of the `codes` along the packed axis is in a plane of fields: its word, or row of words, and its bit.
constexpr int64_t first_word(const Plane& plane, int64_t codes) { return (codes * plane.above + 31) / 32; }
constexpr int64_t word_of_code(const Plane& plane, int64_t i, int64_t codes) {
    return first_word(plane, codes) + i / (32 / plane.width);
}
constexpr int32_t shift_of_code(const Plane& plane, int64_t i) {
    const int64_t r = i % (32 / plane.width);
    return (int32_t)(8 * (r % 4) + plane.width * (r / 4));
}
constexpr uint32_t mask_of(const Plane& plane) { return (1u << plane.width) - 1; }
constexpr uint32_t field_of(const Plane& plane, uint32_t code) {
    return plane.width == BITS ? code : code >> plane.shift & mask_of(plane);
}
inline vf to_floats(vub codes) { return __builtin_convertvector(widen(codes), vf); }

// The first n words at p, all L where there are as many.
ALWAYS_INLINE vi load_words(const int32_t* p, int64_t n) {
    if (n >= L) return load<vi>(p);
    vi words = {};
    std::memcpy(&words, p, n * 4);
    return words;
}

// The codes of n channels of token t, of `tokens` whose words begin at `words`. Whole vectors of floats are written.
ALWAYS_INLINE void get_codes(const int32_t* words, int64_t t, int64_t tokens, int64_t n, float* codes) {
    for (int64_t i = 0; i < n; i += L) {
        vi code = {};
        for (const Plane& plane : PLANES) {
            const vi word = load_words(words + word_of_code(plane, t, tokens) * D + i, n - i);
            code |= (word >> shift_of_code(plane, t) & (int32_t)mask_of(plane)) << (int)plane.shift;
        }
        store(codes + i, __builtin_convertvector(code, vf));
    }
}

}  // namespace xq
