// Codes of one token, of which each word holds as many as it has fields (kernels/packing.py).
#pragma once

namespace xq {

inline int64_t code_rows(const Inputs& in) { return in.tokens * BITS / 32; }  // of words of one head, in all planes

// Put the codes of n channels of token t among those of the tokens around it; `words` is where the channels of the
// head's first row begin. Whole vectors of codes are read.
ALWAYS_INLINE void put_codes(const Inputs& in, Codes* words, int64_t t, int64_t n, const uint8_t* codes) {
    for (const Plane& plane : PLANES) {
        int32_t* row = const_cast<int32_t*>(words) + word_of_code(plane, t, in.tokens) * D;
        const int32_t shift = shift_of_code(plane, t), field = (int32_t)(mask_of(plane) << shift);
        for (int64_t i = 0; i < n; i += L) {
            const vi word = load_words(row + i, n - i);
            const vi code = widen(load<vub>(codes + i)) >> (int)plane.shift;
            store_up_to(row + i, (word & ~field) | (code << shift & field), n - i);
        }
    }
}

}  // namespace xq
