// Values one by one as they leave the window (kernels/schemes/per_token.py).
#pragma once

namespace xq {

// Values: a group runs along channels of one token.
inline float sum_of_group(const float* x) {
    vf s = splat(0.0f);
    for (int64_t i = 0; i < GROUP; i += L) s += load_up_to(x + i, GROUP - i);
    return sum(s);
}

// The group in float32; returns its least number in all lanes, and its step.
ALWAYS_INLINE void range_of_values(const T* row, float* x, vf& lows, vf& step) {
    float low = INF, high = -INF;
    bool nan = false;
    for (int64_t i = 0; i < GROUP; i++) {
        x[i] = to_float(row[i]);
        nan |= x[i] != x[i];
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    lows = splat(low);
    range_to_step(lows, splat(high), splat(nan ? -1 : 0), splat((float)MAX_CODE), step);
}

// Put the group's codes into its words.
ALWAYS_INLINE void encode_values(const float* x, vf lows, vf step, Codes* words, int64_t t) {
    uint8_t codes[GROUP + L];
    for (int64_t i = 0; i < GROUP; i += L) store(codes + i, narrow(encode(load_up_to(x + i, GROUP - i), lows, step)));
    put_codes(words, t, GROUP, codes);
}

// Scale and zero point that fit the codes best: a regression of values on codes.
ALWAYS_INLINE void fit_values(const float* x, const int32_t* words, int64_t t, S* scale, S* zero) {
    float c[GROUP + L], cov[GROUP + L], var[GROUP + L];
    get_codes(words, t, GROUP, c);
    const float mean_x = sum_of_group(x) / GROUP, mean_c = sum_of_group(c) / GROUP;
    for (int64_t i = 0; i < GROUP; i++) {
        const float dc = c[i] - mean_c;
        cov[i] = dc * (x[i] - mean_x);
        var[i] = dc * dc;
    }
    const float total = sum_of_group(var), s = total > 0.0f ? sum_of_group(cov) / total : 0.0f;
    store_scale_and_zero(scale, zero, s, mean_x - s * mean_c);
}

// Values of one token.
inline void store_token(const Inputs& in, int64_t head, int64_t t) {
    const T* row = token(in, head, t);
    const int64_t slot = slot_of(t);
    for (int64_t g = 0; g < D / GROUP; g++) {
        S* scale = in.scale + (head * (D / GROUP) + g) * TOKENS + slot;
        S* zero = in.zero + (head * (D / GROUP) + g) * TOKENS + slot;
        Codes* words = in.codes + head * CODE_ROWS * D + g * GROUP;
        float x[GROUP + L];
        vf lows, step;
        range_of_values(row + g * GROUP, x, lows, step);
        if (!BORROWED) encode_values(x, lows, step, words, slot);
        if (FIT) fit_values(x, words, slot, scale, zero);
        else store_relaxed(scale, zero, lows, step, 1);
    }
}

}  // namespace xq
