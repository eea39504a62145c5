// Values one by one as they leave the window (kernels/schemes/per_token.py).
#pragma once

namespace xq {

// A group runs along channels of one token: in float32, with its least number in all lanes, and its step.
ALWAYS_INLINE void range_of_values(const T* row, float* x, vf& lows, vf& step) {
    vf low = splat(INF), high = splat(-INF);
    vi nan = splat(0);
    for (int64_t i = 0; i < GROUP; i += L) {
        const vf v = load_up_to(row + i, GROUP - i);
        store(x + i, v);
        const vi here = GROUP % L ? iota() < (int32_t)(GROUP - i) : splat(-1);
        nan |= v != v;
        low = (here & (v < low)) ? v : low;
        high = (here & (v > high)) ? v : high;
    }
    lows = splat(-max(-low));
    range_to_step(lows, splat(max(high)), splat(any(nan) ? -1 : 0), splat((float)MAX_CODE), step);
}

// Put the group's codes into its words.
ALWAYS_INLINE void encode_values(const Inputs& in, const float* x, vf lows, vf step, Codes* words, int64_t t) {
    uint8_t codes[GROUP + L];
    for (int64_t i = 0; i < GROUP; i += L) store(codes + i, narrow(encode(load_up_to(x + i, GROUP - i), lows, step)));
    put_codes(in, words, t, GROUP, codes);
}

// Scale and zero point that fit the codes best: a regression of values on codes.
ALWAYS_INLINE void fit_values(const Inputs& in, const float* x, const int32_t* words, int64_t t, S* scale, S* zero) {
    float c[GROUP + L];
    get_codes(words, t, in.tokens, GROUP, c);
    vf sum_x = splat(0.0f), sum_c = sum_x, cov = sum_x, var = sum_x;
    for (int64_t i = 0; i < GROUP; i += L) {
        sum_x += load_up_to(x + i, GROUP - i);
        sum_c += load_up_to(c + i, GROUP - i);
    }
    const float mean_x = sum(sum_x) / GROUP, mean_c = sum(sum_c) / GROUP;
    for (int64_t i = 0; i < GROUP; i += L) {
        const vf dc = load<vf>(c + i) - mean_c;
        cov += mask_first(dc * (load<vf>(x + i) - mean_x), GROUP - i);
        var += mask_first(dc * dc, GROUP - i);
    }
    const float total = sum(var), s = total > 0.0f ? sum(cov) / total : 0.0f;
    store_scale_and_zero(scale, zero, s, mean_x - s * mean_c);
}

// Values of one token.
inline void store_token(const Inputs& in, int64_t head, int64_t t) {
    const T* row = token(in, head, t);
    const int64_t slot = slot_of(t);
    for (int64_t g = 0; g < D / GROUP; g++) {
        S* scale = in.scale + (head * (D / GROUP) + g) * in.tokens + slot;
        S* zero = in.zero + (head * (D / GROUP) + g) * in.tokens + slot;
        Codes* words = in.codes + head * code_rows(in) * D + g * GROUP;
        float x[GROUP + L];
        vf lows, step;
        range_of_values(row + g * GROUP, x, lows, step);
        if (!BORROWED) encode_values(in, x, lows, step, words, slot);
        if (FIT) fit_values(in, x, words, slot, scale, zero);
        else store_relaxed(scale, zero, lows, step, 1);
    }
}

}  // namespace xq
