// Append a step's tokens to one side of one layer (the CPU kernel of xquant::quantize_store).
//
// The same as kernels/store.py does with whole tensors, but a block of keys is quantized only in the
// step that completes it. Constants come from kernels/cpu_store.py.

namespace xq {

constexpr int64_t RING = RESIDUAL + RING_SLACK, PER = 32 / BITS;
constexpr int64_t WORDS = (D + PER - 1) / PER;      // of a key
constexpr int64_t D_PAD = (D + L - 1) / L * L;
constexpr int32_t TOP = (1 << BITS) - 1;
constexpr float INF = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

struct Inputs {
    T* x;
    int64_t* pos;
    int32_t* codes;  // not written where they are borrowed
    S* scale;
    S* zero;
    T* ring;
    T* sink;
    int64_t* start;
    int64_t* length;
    int32_t* fault;
    int64_t past;
};

inline int32_t shift_of(int64_t r) { return 8 * (r % 4) + BITS * (r / 4); }
inline const T* in_ring(const Inputs& in, int64_t head, int64_t t) { return in.ring + (head * RING + t % RING) * D; }

// Scale and zero point of one group as they are stored: (0, NaN) where either does not fit its dtype.
inline void put(S* scale, S* zero, float s, float z) {
    const S a = from_float<S>(s), b = from_float<S>(z);
    const bool finite = std::abs(to_float(a)) < INF && std::abs(to_float(b)) < INF;
    *scale = finite ? a : from_float<S>(0.0f);
    *zero = finite ? b : from_float<S>(NOT_A_NUMBER);
}

// Range of a group, lane by lane: (NaN, 0) where it is not finite.
inline void finish_range(vf& low, vf high, vi nan, vf& step) {
    const vi empty = low > high;
    low = empty ? splat(0.0f) : low;
    high = empty ? splat(0.0f) : high;
    step = (high - low) / (float)TOP;
    const vi finite = (abs(step) < INF) & ~nan;
    low = finite ? low : splat(NOT_A_NUMBER);
    step = finite ? step : splat(0.0f);
}

inline vi encode(vf x, vf low, vf step) {
    const vi used = step > 0.0f;
    const vi c = round_to_int((x - low) / (used ? step : splat(1.0f)));
    const vi inside = c < 0 ? splat(0) : (c > TOP ? splat(TOP) : c);
    return used ? inside : splat(0);
}

// Scales and zeros of the lanes of a group whose range is known (Eq. 5: both ends relaxed by eta).
inline void put_relaxed(S* scale, S* zero, vf low, vf step, int64_t n) {
    const vf s = step * RELAXED_SCALE, z = low + step * RELAXED_ZERO;
    for (int64_t i = 0; i < std::min<int64_t>(n, L); i++) put(scale + i, zero + i, s[i], z[i]);
}

// Keys of tokens [t0, t0 + GROUP): a group runs along tokens, a lane is a channel.
inline void store_key_group(const Inputs& in, int64_t head, int64_t t0) {
    const int64_t first = std::max<int64_t>(in.start[head / H] + SINKS - t0, 0);  // padding and sinks do not count
    S* scale = in.scale + (head * (TOKENS / GROUP) + t0 / GROUP) * D;
    S* zero = in.zero + (head * (TOKENS / GROUP) + t0 / GROUP) * D;
    int32_t* codes = in.codes + head * WORDS * TOKENS + t0;
    std::unique_ptr<uint8_t[]> code(new uint8_t[GROUP * (D_PAD + PER)]());
    uint8_t* c = code.get();
    constexpr int64_t pitch = D_PAD + PER;
    if (BORROWED)
        for (int64_t t = 0; t < GROUP; t++)
            for (int64_t d = 0; d < D; d++)
                c[t * pitch + d] = (uint8_t)((uint32_t)codes[d / PER * TOKENS + t] >> shift_of(d % PER) & TOP);
    for (int64_t d = 0; d < D; d += L) {
        vf low = splat(INF), high = splat(-INF), step, x;
        vi nan = splat(0);
        for (int64_t t = first; t < GROUP; t++) {
            x = load_up_to(in_ring(in, head, t0 + t) + d, D - d);
            nan |= x != x;
            low = x < low ? x : low;
            high = x > high ? x : high;
        }
        finish_range(low, high, nan, step);
        if (!BORROWED)
            for (int64_t t = 0; t < GROUP; t++) {
                x = load_up_to(in_ring(in, head, t0 + t) + d, D - d);
                store(c + t * pitch + d, narrow(encode(x, low, step)));
            }
        if (!BORROWED || !LEAST_SQUARES) {
            put_relaxed(scale + d, zero + d, low, step, D - d);
            continue;
        }
        vf mean_x = splat(0.0f), mean_c = mean_x, cov = mean_x, var = mean_x;
        const float count = (float)std::max<int64_t>(GROUP - first, 1);
        for (int64_t t = first; t < GROUP; t++) {
            mean_x += load_up_to(in_ring(in, head, t0 + t) + d, D - d);
            mean_c += __builtin_convertvector(widen(load<vub>(c + t * pitch + d)), vf);
        }
        mean_x /= count;
        mean_c /= count;
        for (int64_t t = first; t < GROUP; t++) {
            const vf dc = __builtin_convertvector(widen(load<vub>(c + t * pitch + d)), vf) - mean_c;
            cov += dc * (load_up_to(in_ring(in, head, t0 + t) + d, D - d) - mean_x);
            var += dc * dc;
        }
        const vf s = var > 0.0f ? cov / var : splat(0.0f), z = mean_x - s * mean_c;
        for (int64_t i = 0; i < std::min<int64_t>(L, D - d); i++) put(scale + d + i, zero + d + i, s[i], z[i]);
    }
    if (!BORROWED)
        for (int64_t t = 0; t < GROUP; t++)
            for (int64_t w = 0; w < WORDS; w++) {
                uint32_t word = 0;
                for (int64_t r = 0; r < PER; r++)
                    if (w * PER + r < D) word |= (uint32_t)c[t * pitch + w * PER + r] << shift_of(r);
                codes[w * TOKENS + t] = (int32_t)word;
            }
}

inline float sum_of(const float* x) {
    vf s = splat(0.0f);
    for (int64_t i = 0; i < GROUP; i += L) s += load_up_to(x + i, GROUP - i);
    return sum(s);
}

// Values of one token: a group runs along channels.
inline void store_value(const Inputs& in, int64_t head, int64_t t) {
    const T* row = in_ring(in, head, t);
    int32_t* codes = in.codes + (head * (TOKENS / PER) + t / PER) * D;
    const int32_t shift = shift_of(t % PER), mask = (int32_t)((uint32_t)TOP << shift);
    for (int64_t g = 0; g < D / GROUP; g++) {
        S* scale = in.scale + (head * (D / GROUP) + g) * TOKENS + t;
        S* zero = in.zero + (head * (D / GROUP) + g) * TOKENS + t;
        float x[GROUP + L], c[GROUP + L];
        float low = INF, high = -INF;
        bool nan = false;
        for (int64_t i = 0; i < GROUP; i++) {
            x[i] = to_float(row[g * GROUP + i]);
            nan |= x[i] != x[i];
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
        }
        vf lows = splat(low), step;
        finish_range(lows, splat(high), splat(nan ? -1 : 0), step);
        for (int64_t i = 0; i < GROUP; i += L) {
            const int64_t n = std::min<int64_t>(L, GROUP - i);
            int32_t* word = codes + g * GROUP + i;
            if (BORROWED) {
                for (int64_t j = 0; j < n; j++) c[i + j] = (float)((uint32_t)word[j] >> shift & TOP);
            } else {
                const vi code = encode(load_up_to(x + i, n), lows, step);
                for (int64_t j = 0; j < n; j++) word[j] = (word[j] & ~mask) | (int32_t)((uint32_t)code[j] << shift);
            }
        }
        if (!BORROWED || !LEAST_SQUARES) {
            put_relaxed(scale, zero, lows, step, 1);
            continue;
        }
        const float mean_x = sum_of(x) / GROUP, mean_c = sum_of(c) / GROUP;
        float cov[GROUP + L], var[GROUP + L];
        for (int64_t i = 0; i < GROUP; i++) {
            const float dc = c[i] - mean_c;
            cov[i] = dc * (x[i] - mean_x);
            var[i] = dc * dc;
        }
        const float total = sum_of(var), s = total > 0.0f ? sum_of(cov) / total : 0.0f;
        put(scale, zero, s, mean_x - s * mean_c);
    }
}

inline void store_head(const Inputs& in, int64_t head) {
    const int64_t end = in.past + Q;
    for (int64_t i = 0; i < Q; i++) {
        const T* x = in.x + (head * Q + i) * D;
        std::memcpy((void*)in_ring(in, head, in.past + i), (const void*)x, D * sizeof(T));
        const int64_t slot = in.pos[i] - in.start[head / H];
        if (SINKS && slot >= 0 && slot < SINKS)
            std::memcpy((void*)(in.sink + (head * (SINKS + 1) + slot) * D), (const void*)x, D * sizeof(T));
    }
    if (IS_KEY) {
        for (int64_t t = in.past / RESIDUAL * RESIDUAL; t + RESIDUAL <= end; t += RESIDUAL)
            for (int64_t g = 0; g < RESIDUAL; g += GROUP) store_key_group(in, head, t + g);
    } else {
        for (int64_t t = std::max<int64_t>(in.past - RESIDUAL, 0); t < end - RESIDUAL; t++) store_value(in, head, t);
    }
}

// Why these positions cannot follow what is stored (xquant_fx/faults.py), or 0.
inline int32_t fault_code(const Inputs& in) {
    const int64_t past = in.pos[0];
    int32_t code = past > in.length[0] || past < 0 ? 1 : 0;
    if (past + Q > N) code = 2;
    if (past > 0 && in.length[1] - past > STEP_TOKENS) code = 3;
    if (past == 0 && in.length[0] == N) code = 5;
    for (int64_t i = 0; i < Q; i++)
        if (in.pos[i] != past + i) code = 4;
    return code;
}

void append(Inputs in) {
    *in.fault = std::max(*in.fault, fault_code(in));
    in.past = std::clamp<int64_t>(in.pos[0], 0, N - Q);  // a step past the end is written over the last tokens
    const int64_t heads = B * H;
    const bool flush = IS_KEY && (in.past + Q) / RESIDUAL > in.past / RESIDUAL;
    const int team = flush ? max_threads() : 1;  // a step's own work is too little to share out
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t head = 0; head < heads; head++) store_head(in, head);
    const int64_t stored = in.past + Q;
    in.length[1] = in.past == 0 ? stored : std::max(in.length[1], stored);
    in.length[0] = stored;
}

}  // namespace xq
