// Quantize a group of keys whose channels are ranked (kernels/schemes/per_channel_ranked.py). A lane is a channel.
#pragma once

namespace xq {

// Tokens [t0, t0 + GROUP) of one head in float32, divided by their norms, and which of them count.
struct RankedGroup {
    int64_t first, count;  // tokens from `first` on are neither padding nor sinks
    std::unique_ptr<float[]> x;  // [GROUP, D_PAD]
    vf at(int64_t t, int64_t d) const { return load<vf>(x.get() + t * D_PAD + d); }
};

inline RankedGroup load_group(const Inputs& in, int64_t head, int64_t t0) {
    RankedGroup keys;
    keys.first = std::clamp<int64_t>(in.start[head / H] + SINKS - t0, 0, GROUP);
    keys.count = GROUP - keys.first;
    keys.x.reset(new float[GROUP * D_PAD]);
    for (int64_t t = 0; t < GROUP; t++) {
        const float norm = NORMS ? decode_scale(in.norm[head / H * in.tokens + slot_of(t0 + t)]) : 1.0f;
        for (int64_t d = 0; d < D; d += L)
            store(keys.x.get() + t * D_PAD + d, load_up_to(token(in, head, t0 + t) + d, D - d) / norm);
    }
    return keys;
}

// Mean, and mean squared distance from it.
inline void moments(const RankedGroup& keys, int64_t d, vf& mean, vf& variance) {
    const float count = (float)std::max<int64_t>(keys.count, 1);
    mean = variance = splat(0.0f);
    for (int64_t t = keys.first; t < GROUP; t++) mean += keys.at(t, d);
    mean /= count;
    for (int64_t t = keys.first; t < GROUP; t++) {
        const vf off = keys.at(t, d) - mean;
        variance += off * off;
    }
    variance /= count;
}

// Sums over the tokens that count of some groups, by channel: of keys, of their squares, and of squared distances from
// the mean of their group.
struct Sums {
    float count = 0.0f;
    float key[D_PAD] = {}, square[D_PAD] = {}, distance[D_PAD] = {};

    void add(const RankedGroup& keys) {
        count += (float)keys.count;
        for (int64_t d = 0; d < D; d += L) {
            vf mean, variance, total = load<vf>(key + d), squares = load<vf>(square + d);
            moments(keys, d, mean, variance);
            for (int64_t t = keys.first; t < GROUP; t++) {
                const vf x = keys.at(t, d);
                total += x;
                squares += x * x;
            }
            store(key + d, total);
            store(square + d, squares);
            store(distance + d, load<vf>(distance + d) + variance * (float)keys.count);
        }
    }
};

// Rank the channels by what groups [begin, end) of a sequence's first tokens say: variance times the queries' mean
// square (that of the keys, if no query was seen).
inline void note_ranks(const Inputs& in, int64_t head, int64_t begin, int64_t end) {
    std::unique_ptr<Sums> sums(new Sums);
    for (int64_t t = begin; t < end; t += GROUP) sums->add(load_group(in, head, t));
    if (sums->count == 0.0f) return;
    const float* energy = in.energy + head * D;
    bool seen = false;
    for (int64_t d = 0; d < D; d++) seen |= energy[d] > 0.0f;
    float importance[D], center[D];
    for (int64_t d = 0; d < D; d++) {
        const float found = sums->distance[d] / sums->count * (seen ? energy[d] : sums->square[d] / sums->count);
        importance[d] = found == found ? found : 0.0f;
        const float mean = sums->key[d] / sums->count;
        center[d] = std::abs(mean) < INF ? mean : 0.0f;
    }
    int32_t* order = in.order + head * D;
    for (int64_t r = 0; r < D; r++) order[r] = (int32_t)r;
    std::stable_sort(order, order + D, [&](int32_t a, int32_t b) { return importance[a] > importance[b]; });
    for (int64_t r = 0; r < D; r++) in.center[head * D + r] = center[order[r]];
}

// Codes of the channels from d on, and their scale and mid point as they are stored. `n` is the largest code.
inline void quantize_ranked(const RankedGroup& keys, int64_t d, vf n, const float* center, uint8_t* codes, S* scale,
                            S* zero) {
    vf low = splat(INF), high = splat(-INF), step, level = splat(0.0f), spread = level, mean, variance;
    vi nan = splat(0);
    for (int64_t t = keys.first; t < GROUP; t++) {
        const vf x = keys.at(t, d);
        nan |= x != x;
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    range_to_step(low, high, nan, n < 1.0f ? splat(1.0f) : n, step);
    for (int64_t t = 0; t < GROUP; t++) {
        const vi code = encode(keys.at(t, d), low, step, __builtin_convertvector(n, vi));
        store(codes + t * D_PAD + d, narrow(code));
        if (t >= keys.first) level += __builtin_convertvector(code, vf) - 0.5f * n;
    }
    moments(keys, d, mean, variance);
    level /= (float)std::max<int64_t>(keys.count, 1);
    for (int64_t t = keys.first; t < GROUP; t++) {
        const vf off = to_floats(load<vub>(codes + t * D_PAD + d)) - 0.5f * n - level;
        spread += off * off;
    }
    spread /= (float)std::max<int64_t>(keys.count, 1);
    for (int64_t i = 0; i < std::min<int64_t>(L, D - d); i++) {
        const float offset = mean[i] - center[d + i];
        float s = spread[i] > 0.0f ? std::sqrt(variance[i] / spread[i]) : n[i] > 0.0f ? 0.0f : std::sqrt(variance[i]);
        s = std::max(s, std::abs(offset) / (LARGEST_MID - n[i]));
        encode_scale(low[i] == low[i] ? s : NOT_A_NUMBER, scale + d + i);
        const float stored = decode_scale(scale[d + i]);
        encode_mid(stored > 0.0f ? (offset - stored * level[i]) / stored : 0.0f, zero + d + i);
    }
}

// Put the codes [GROUP, D_PAD] of channels into the planes of their ranks.
inline void pack_ranked(const uint8_t* codes, const int32_t* order, int32_t* packed, int64_t tokens) {
    for (const Field& field : FIELDS) {
        int32_t* words = packed + field.word * tokens;
        const uint8_t* code = codes + order[field.rank];
        for (int64_t t = 0; t < GROUP; t++) {
            const uint32_t bits = (uint32_t)code[t * D_PAD] >> field.shift & field.mask;
            words[t] = (int32_t)((field.first ? 0u : (uint32_t)words[t]) | bits << field.bit);
        }
    }
}

inline void store_ranked_group(const Inputs& in, int64_t head, int64_t t0) {
    const RankedGroup keys = load_group(in, head, t0);
    const int32_t* order = in.order + head * D;
    std::unique_ptr<uint8_t[]> buffer(new uint8_t[GROUP * D_PAD]);
    float n[D_PAD] = {}, center[D_PAD] = {};
    for (int64_t r = 0; r < D; r++) {
        n[order[r]] = (float)LARGEST_CODES[r];
        center[order[r]] = in.center[head * D + r];
    }
    S scale[D_PAD], zero[D_PAD];
    for (int64_t d = 0; d < D; d += L) quantize_ranked(keys, d, load<vf>(n + d), center, buffer.get(), scale, zero);
    const int64_t slot = slot_of(t0), row = (head * (in.tokens / GROUP) + slot / GROUP) * D;
    for (int64_t r = 0; r < D; r++) {
        in.scale[row + r] = scale[order[r]];
        in.zero[row + r] = zero[order[r]];
    }
    pack_ranked(buffer.get(), order, in.codes + head * WORDS * in.tokens + slot, in.tokens);
}

constexpr int64_t SLICE = GROUP;
constexpr bool DUE_IS_MUCH = true;

inline int64_t due_end(int64_t stored) { return ranked_limit(stored, RESIDUAL, GROUP); }

// Norms of tokens of a batch row: root mean squares over the channels of all heads.
inline void note_tokens(const Inputs& in, int64_t row, int64_t from, int64_t to) {
    if constexpr (!NORMS) return;
    for (int64_t t = from; t < to; t++) {
        vf squares = splat(0.0f);
        for (int64_t head = row * H; head < (row + 1) * H; head++)
            for (int64_t d = 0; d < D; d += L) {
                const vf x = load_up_to(token(in, head, t) + d, D - d);
                squares = fma(x, x, squares);
            }
        encode_norm(std::sqrt(sum(squares) / (H * D)), in.norm + row * in.tokens + slot_of(t));
    }
}

inline void prepare_due(const Inputs& in, int64_t head, int64_t from, int64_t to) {
    // Of a padded sequence the first group that is no padding counts.
    if (from < to && from <= (in.start[head / H] + SINKS) / GROUP * GROUP) note_ranks(in, head, from, to);
}

inline void quantize_due(const Inputs& in, int64_t head, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t += GROUP) store_ranked_group(in, head, t);
}

}  // namespace xq
