// Keys in blocks that are quantized when full (kernels/schemes/per_channel.py).
#pragma once

namespace xq {

// A block of keys: tokens [t0, t0 + GROUP) of one head. A group runs along tokens, a lane is a channel.
struct KeyGroup {
    const Inputs& in;
    int64_t head, t0;
    int64_t first;  // padding and sinks before this token of the group do not count
    vf at(int64_t t, int64_t d) const { return load_up_to(token(in, head, t0 + t) + d, D - d); }
};

ALWAYS_INLINE void unpack_key_codes(const int32_t* packed, int64_t tokens, uint8_t* codes) {
    for (const Plane& plane : PLANES)
        for (int64_t t = 0; t < GROUP; t++)
            for (int64_t d = 0; d < D; d++) {
                const uint32_t word = (uint32_t)packed[word_of_code(plane, d, D) * tokens + t];
                codes[t * PITCH + d] |= (uint8_t)((word >> shift_of_code(plane, d) & mask_of(plane)) << plane.shift);
            }
}

template <int I> ALWAYS_INLINE void pack_plane(const uint8_t* codes, Codes* packed, int64_t tokens) {
    constexpr Plane PLANE = PLANES[I];
    constexpr int64_t PER_WORD = 32 / PLANE.width;
    for (int64_t t = 0; t < GROUP; t++)
        for (int64_t w = 0; w * PER_WORD < D; w++) {
            uint32_t word = 0;
            for (int64_t i = 0; i < PER_WORD; i++)
                if (w * PER_WORD + i < D) {
                    const uint32_t code = codes[t * PITCH + w * PER_WORD + i];
                    word |= field_of(PLANE, code) << shift_of_code(PLANE, i);
                }
            write(packed + (first_word(PLANE, D) + w) * tokens + t, (int32_t)word);
        }
}

ALWAYS_INLINE void pack_key_codes(const uint8_t* codes, Codes* packed, int64_t tokens) {
    pack_plane<0>(codes, packed, tokens);
    if constexpr (PLANE_COUNT > 1) pack_plane<PLANE_COUNT - 1>(codes, packed, tokens);
}

// Least number and step of the channels from d on.
ALWAYS_INLINE void range_of_channels(const KeyGroup& keys, int64_t d, vf& low, vf& step) {
    vf high = splat(-INF), x;
    vi nan = splat(0);
    low = splat(INF);
    for (int64_t t = keys.first; t < GROUP; t++) {
        x = keys.at(t, d);
        nan |= x != x;
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    range_to_step(low, high, nan, splat((float)MAX_CODE), step);
}

ALWAYS_INLINE void encode_channels(const KeyGroup& keys, int64_t d, vf low, vf step, uint8_t* codes) {
    for (int64_t t = 0; t < GROUP; t++) {
        const vf x = keys.at(t, d);
        store(codes + t * PITCH + d, narrow(encode(x, low, step)));
    }
}

// Scale and zero point of the channels from d on that fit their codes best: a regression of keys on codes.
ALWAYS_INLINE void fit_channels(const KeyGroup& keys, int64_t d, const uint8_t* codes, S* scale, S* zero) {
    vf mean_x = splat(0.0f), mean_c = mean_x, cov = mean_x, var = mean_x;
    const float count = (float)std::max<int64_t>(GROUP - keys.first, 1);
    for (int64_t t = keys.first; t < GROUP; t++) {
        mean_x += keys.at(t, d);
        mean_c += to_floats(load<vub>(codes + t * PITCH + d));
    }
    mean_x /= count;
    mean_c /= count;
    for (int64_t t = keys.first; t < GROUP; t++) {
        const vf dc = to_floats(load<vub>(codes + t * PITCH + d)) - mean_c;
        cov += dc * (keys.at(t, d) - mean_x);
        var += dc * dc;
    }
    const vf s = var > 0.0f ? cov / var : splat(0.0f), z = mean_x - s * mean_c;
    for (int64_t i = 0; i < std::min<int64_t>(L, D - d); i++)
        store_scale_and_zero(scale + d + i, zero + d + i, s[i], z[i]);
}

inline void store_key_group(const Inputs& in, int64_t head, int64_t t0) {
    const KeyGroup keys = {in, head, t0, std::max<int64_t>(in.start[head / H] + SINKS - t0, 0)};
    const int64_t slot = slot_of(t0), row = (head * (in.tokens / GROUP) + slot / GROUP) * D;
    S* scale = in.scale + row;
    S* zero = in.zero + row;
    Codes* packed = in.codes + head * WORDS * in.tokens + slot;
    std::unique_ptr<uint8_t[]> buffer(new uint8_t[GROUP * PITCH]());
    uint8_t* codes = buffer.get();
    if (BORROWED) unpack_key_codes(packed, in.tokens, codes);
    for (int64_t d = 0; d < D; d += L) {
        vf low, step;
        if (!FIT) range_of_channels(keys, d, low, step);
        if (!BORROWED) encode_channels(keys, d, low, step, codes);
        if (FIT) fit_channels(keys, d, codes, scale, zero);
        else store_relaxed(scale + d, zero + d, low, step, D - d);
    }
    if (!BORROWED) pack_key_codes(codes, packed, in.tokens);
}

constexpr int64_t SLICE = RESIDUAL;
constexpr bool DUE_IS_MUCH = true;

inline int64_t due_end(int64_t stored) { return stored / RESIDUAL * RESIDUAL; }

inline void note_tokens(const Inputs&, int64_t, int64_t, int64_t) {}

inline void prepare_due(const Inputs&, int64_t, int64_t, int64_t) {}

inline void quantize_due(const Inputs& in, int64_t head, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t += GROUP) store_key_group(in, head, t);
}

}  // namespace xq
