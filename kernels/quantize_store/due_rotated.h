// Quantize a token of values that is rotated here (kernels/schemes/per_token_rotated.py), or, where ROTATED is 0, was
// before (per_token_folded.py).
#pragma once

namespace xq {

// The token's D_PAD channels in float32, rotated if they are to be.
ALWAYS_INLINE void load_rotated(const T* row, float* y) {
    for (int64_t d = 0; d < D; d += L) store(y + d, load_up_to(row + d, D - d));
    if constexpr (ROTATED > 0) {
        for (int64_t d = 0; d < D; d += L) store(y + d, load<vf>(y + d) * load_up_to(ROTATION_SIGNS + d, D - d));
        hadamard<D, ROTATED>(y);
        for (int64_t d = 0; d < D; d += L) store(y + d, load<vf>(y + d) * ROTATION_SCALE);
    }
}

// L numbers from i on of those of a group, zeros behind it.
ALWAYS_INLINE vf in_group(const float* x, int64_t i) {
    const vf v = load<vf>(x + i);
    return GROUP % L ? mask_first(v, GROUP - i) : v;
}

inline void store_token(const Inputs& in, int64_t head, int64_t t) {
    const T* row = token(in, head, t);
    const int64_t slot = slot_of(t);
    float y[D_PAD + L];
    load_rotated(row, y);
    uint8_t codes[D_PAD + L];
    for (int64_t g = 0; g < D / GROUP; g++) {
        const float* x = y + g * GROUP;
        vf squares = splat(0.0f), products = splat(0.0f);
        for (int64_t i = 0; i < GROUP; i += L) {
            const vf v = in_group(x, i);
            squares += v * v;
        }
        const float square = sum(squares), step = GAUSSIAN_STEP * std::sqrt(square / GROUP);
        for (int64_t i = 0; i < GROUP; i += L) {
            const vf v = in_group(x, i);
            vf code = v / (step > 0.0f ? step : 1.0f) + 0.5f * (MAX_CODE + 1);
            code = code > 0.0f ? code : splat(0.0f);  // a NaN, too
            code = code > (float)MAX_CODE ? splat((float)MAX_CODE) : code;
            const vi whole = __builtin_convertvector(code, vi);
            products += v * (__builtin_convertvector(whole, vf) - 0.5f * MAX_CODE);
            store_up_to(codes + g * GROUP + i, narrow(whole), GROUP - i);
        }
        const float aligned = sum(products);
        encode_scale(square == 0.0f ? 0.0f : square / aligned, in.scale + (head * (D / GROUP) + g) * in.tokens + slot);
    }
    put_codes(in, in.codes + head * code_rows(in) * D, slot, D, codes);
}

}  // namespace xq
