// Quantize a rotated token of values (kernels/schemes/per_token_rotated.py).
#pragma once

namespace xq {

inline void store_rotated(const Inputs& in, int64_t head, int64_t t) {
    const T* row = ring_token(in, head, t);
    float y[D_PAD + L] = {};
    for (int64_t d = 0; d < D; d++) y[d] = to_float(row[d]) * ROTATION_SIGNS[d];
    hadamard<D, ROTATED>(y);
    for (int64_t d = 0; d < D; d++) y[d] *= ROTATION_SCALE;
    Codes* codes = in.codes + (head * (TOKENS / CODES_PER_WORD) + t / CODES_PER_WORD) * D;
    const int32_t shift = shift_of_code(t % CODES_PER_WORD), mask = (int32_t)((uint32_t)MAX_CODE << shift);
    for (int64_t g = 0; g < D / GROUP; g++) {
        float square = 0.0f, aligned = 0.0f;
        for (int64_t i = 0; i < GROUP; i++) square += y[g * GROUP + i] * y[g * GROUP + i];
        const float step = GAUSSIAN_STEP * std::sqrt(square / GROUP);
        for (int64_t i = 0; i < GROUP; i++) {
            const float x = y[g * GROUP + i], exact = x / (step > 0.0f ? step : 1.0f) + 0.5f * (MAX_CODE + 1);
            const float code = exact == exact ? std::clamp(std::floor(exact), 0.0f, (float)MAX_CODE) : 0.0f;
            aligned += x * (code - 0.5f * MAX_CODE);
            write(codes + g * GROUP + i, (codes[g * GROUP + i] & ~mask) | (int32_t)((uint32_t)code << shift));
        }
        in.scale[(head * (D / GROUP) + g) * TOKENS + t] = encode_scale(square == 0.0f ? 0.0f : square / aligned);
    }
}

inline bool any_due(int64_t, int64_t) { return false; }  // too little to share out

inline void quantize_due(const Inputs& in, int64_t head, int64_t end) {
    for (int64_t t = std::max<int64_t>(in.past - RESIDUAL, 0); t < end - RESIDUAL; t++) store_rotated(in, head, t);
}

}  // namespace xq
