// Decode attention that reads packed codes (the CPU kernel of xquant::decode_attention).
//
// The constants in front of this file (kernels/cpu_attention.py writes them) fix dtypes, shapes and
// bits; the loops below are the algorithm:
//
//   score  q . (c * s + z) = (q * s) . c + q . z     keys: scale and zero of a channel in a token group,
//                                                    so q * s is made once a group
//   output sum p (c * s + z) = (p * s) . c + sum p z values: scale and zero of a token, folded into p
//
// What is left to do an element is an integer dot product of codes with (q * s) or (p * s), which is
// split into DIGITS signed bytes of a fixed-point number (two are exact to 2**-15 of the largest,
// three to 2**-22). Codes are packed along the axis of that sum, four to the four bytes of a word.
//
// A span of SPAN tokens is taken at a time: scores, online softmax, weighted values. All query heads
// of a KV head (and all queries of the step) are the rows that share one read of the codes.

namespace xq {

constexpr int64_t ALL_ROWS = HQ / H * Q;  // rows of a KV head; ROWS of them are taken at a time
constexpr int64_t ROW_BLOCKS = ALL_ROWS / ROWS;
// Long spans cost less a token; short ones leave pieces for all threads where heads are few.
constexpr int64_t SPAN = B * H * ROW_BLOCKS >= 8 ? 1024 : 256;
constexpr int64_t SLACK = SPAN + L;  // a vector may be stored past the span's last token
static_assert(ALL_ROWS % ROWS == 0, "");
constexpr int64_t K_PER = 32 / K_BITS, V_PER = 32 / V_BITS;
constexpr int64_t K_WORDS = (DK + K_PER - 1) / K_PER;
constexpr int64_t DK_PAD = K_WORDS * K_PER;
constexpr int64_t V_GROUPS = DV / V_GROUP;
constexpr int64_t DV_PAD = (DV + L - 1) / L * L;
constexpr int64_t RING = RESIDUAL + RING_SLACK;
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr int64_t MASK_ROWS = (MASK_B ? B : 1) * (MASK_H ? HQ : 1) * (MASK_Q ? Q : 1);
static_assert(SPAN % V_PER == 0, "a word of values lies in one span");
static_assert(V_GROUP % L == 0 || (V_TOKENS / V_PER - (N + V_PER - 1) / V_PER) * DV >= L,
              "loads of whole vectors end in spare rows");

struct Inputs {
    const T* q;
    const int32_t* k_codes;
    const S* k_scale;
    const S* k_zero;
    const T* k_ring;
    const T* k_sink;
    const int32_t* v_codes;
    const S* v_scale;
    const S* v_zero;
    const T* v_ring;
    const T* v_sink;
    const T* k_new;  // the step's own tokens, where they are too many for the ring
    const T* v_new;
    const int64_t* start;
    const MASK* mask;
    const SINK* sink_logits;
    T* out;
    int64_t past, length, keys_end, values_end;  // of the first tokens that are not in the codes
};

struct Rows {  // running softmax of one KV head's rows over some tokens
    float* m;    // [ROWS] largest logit
    float* l;    // [ROWS] sum of exponentials
    float* acc;  // [ROWS, DV_PAD] weighted values
    void clear() {
        std::fill(m, m + ROWS, NONE);
        std::fill(l, l + ROWS, 0.0f);
        std::fill(acc, acc + ROWS * DV_PAD, 0.0f);
    }
    static constexpr int64_t HEADER = (2 * ROWS + 15) / 16 * 16;
    static constexpr int64_t SIZE = HEADER + ROWS * DV_PAD + 16;  // floats; apart by a cache line
    explicit Rows(float* at) : m(at), l(at + ROWS), acc(at + HEADER) {}
};

struct Work {  // scratch of one thread
    float score[ROWS][SLACK];
    float weight[ROWS][SLACK];
    float query[ROWS][DK_PAD + L];
    float folded[ROWS][DK_PAD + L];  // queries times scales; zeros behind them
    float zero_score[ROWS];
    float unit[ROWS];
    alignas(64) int8_t q_digits[ROWS][DIGITS][DK_PAD];
    alignas(64) int8_t p_digits[ROWS][DIGITS][SPAN];
    float p_unit[ROWS];
    float p_zero[ROWS];
    int64_t row0;   // first row of this block
    int64_t group;  // the token group that q_digits and zero_score are for
};

// x [n], n a multiple of four, as DIGITS digits to the base 256; returns what the last digit stands
// for. `largest` holds, over its lanes, the largest |x|. What rounding leaves goes on to a later number
// of the same lane: many small weights beside a large one must not all be rounded the same way.
template <int64_t PITCH> inline float to_digits(const float* x, int64_t n, vf largest, int8_t (*digits)[PITCH]) {
    constexpr float top = DIGITS == 2 ? 32512.0f : 4161536.0f;  // leaves every digit in -128 .. 127
    constexpr int CHAINS = 4;  // each number waits for the one before it in its chain
    const float most = max(largest), inverse = most > 0.0f ? top / most : 0.0f;
    vf left[CHAINS] = {};
    for (int64_t first = 0; first < n; first += CHAINS * L) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) {
            const int64_t i = first + chain * L;
            if (i >= n) break;
            const vf exact = fma(load<vf>(x + i), splat(inverse), left[chain]);
            vi v = round_to_int(exact);
            left[chain] = exact - __builtin_convertvector(v, vf);
            for (int d = DIGITS - 1; d >= 0; d--) {  // a digit is the low byte, taken as signed; the rest is carried
                store_up_to(digits[d] + i, narrow(v), n - i);
                if (d) v = (v + 128) >> 8;
            }
        }
    }
    return most / top;
}

// 0, or NaN if there was an infinity or a NaN among the scales, whose sum times 0 is `seen`: digits cannot
// say so, and a row that sees such a scale is NaN.
inline float spoilt(vf seen) { return any(seen != seen) ? std::numeric_limits<float>::quiet_NaN() : 0.0f; }

// Rows and vectors that `dots` takes at once: their sums are what fills 32 registers, or 16.
constexpr int NROWS = L == 16 ? 4 : 2, NVECS = L < 16 && ROWS == 1 ? 4 : 2;

// Sums over `words` words of codes times digits; lanes are the other axis. NV vectors, NR rows at once.
template <int BITS, int NR, int NV, int64_t PITCH>
inline void dots(const int32_t* codes, int64_t stride, int64_t words, const int8_t (*digits)[DIGITS][PITCH],
                 vf (&out)[NR][NV]) {
    constexpr int PLANES = 8 / BITS;
    const vi mask = splat((int32_t)(0x01010101u * ((1u << BITS) - 1)));
    vi acc[NR][DIGITS][NV] = {};
    for (int64_t first = 0; first < words; first += Dot<BITS>::WORDS) {
        typename Dot<BITS>::Sum sum[NR][DIGITS][NV] = {};
        const int64_t end = std::min(words, first + Dot<BITS>::WORDS);
        for (int64_t w = first; w < end; w++) {
            vu word[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) word[v] = load<vu>(codes + w * stride + v * L);
#pragma GCC unroll 8
            for (int j = 0; j < PLANES; j++) {
                vi code[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) code[v] = BITS == 8 ? (vi)word[v] : (vi)(word[v] >> (BITS * j)) & mask;
#pragma GCC unroll 4
                for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
                    for (int d = 0; d < DIGITS; d++) {
                        const vi digit = splat(load_word(digits[r][d] + (w * PLANES + j) * 4));
#pragma GCC unroll 4
                        for (int v = 0; v < NV; v++) sum[r][d][v] = Dot<BITS>::add(sum[r][d][v], code[v], digit);
                    }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; d++)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) acc[r][d][v] += Dot<BITS>::total(sum[r][d][v]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            vf total = __builtin_convertvector(acc[r][0][v], vf);
            for (int d = 1; d < DIGITS; d++) total = fma(total, splat(256.0f), __builtin_convertvector(acc[r][d][v], vf));
            out[r][v] = total;
        }
}

// Fold the scales of token group g into the queries.
inline void fold_keys(Work& w, const Inputs& in, int64_t head, int64_t g) {
    const int64_t row = (head * K_TOKENS / K_GROUP + g) * DK;
    const S* scale = in.k_scale + row;
    const S* zero = in.k_zero + row;
    vf largest[ROWS] = {}, z[ROWS] = {}, bad = {};
    for (int64_t d = 0; d < DK; d += L) {
        const vf s = load_up_to(scale + d, DK - d), zeros = load_up_to(zero + d, DK - d);
        bad = fma(s, splat(0.0f), bad);
        for (int64_t r = 0; r < ROWS; r++) {
            const vf q = load<vf>(w.query[r] + d), x = q * s;
            store(w.folded[r] + d, x);
            largest[r] = max(abs(x), largest[r]);
            z[r] = fma(q, zeros, z[r]);
        }
    }
    const float nan = spoilt(bad);
    for (int64_t r = 0; r < ROWS; r++) w.zero_score[r] = sum(z[r]);
    for (int64_t r = 0; r < ROWS; r++)
        w.unit[r] = to_digits<DK_PAD>(w.folded[r], DK_PAD, largest[r], w.q_digits[r]) + nan;
    w.group = g;
}

template <int NR, int NV>
inline void key_scores(Work& w, const int32_t* codes, int64_t stride, int64_t row, int64_t at) {
    vf out[NR][NV];
    dots<K_BITS, NR, NV, DK_PAD>(codes, stride, K_WORDS, w.q_digits + row, out);
    for (int r = 0; r < NR; r++)
        for (int v = 0; v < NV; v++)
            store(w.score[row + r] + at + v * L, fma(out[r][v], splat(w.unit[row + r]), splat(w.zero_score[row + r])));
}

template <int NV> inline void key_scores_all(Work& w, const int32_t* codes, int64_t stride, int64_t at) {
    for (int64_t r = 0; r + NROWS <= ROWS; r += NROWS) key_scores<NROWS, NV>(w, codes, stride, r, at);
    if constexpr (ROWS % NROWS) key_scores<ROWS % NROWS, NV>(w, codes, stride, ROWS / NROWS * NROWS, at);
}

constexpr int64_t STRIP = NVECS * L;

// Keys of STRIP tokens are about to be read: fetch keys some way on, and the values of the same tokens,
// whose turn comes after the span's keys. Spread over the span, as only so many lines can be under way.
// GCC drops calls of a function that does nothing else, so it must be inlined before GCC looks.
__attribute__((always_inline)) inline void prefetch(const int32_t* keys, const int32_t* values) {
    constexpr int64_t AHEAD = 256, LINE = 16;
    for (int64_t w = 0; w < K_WORDS; w++)
        for (int64_t i = 0; i < STRIP; i += LINE) __builtin_prefetch(keys + w * K_TOKENS + AHEAD + i);
    for (int64_t i = 0; i < STRIP * DV / V_PER; i += LINE) __builtin_prefetch(values + i);
}

// Scores of tokens [t0, t1), all in the codes.
inline void quantized_scores(Work& w, const Inputs& in, int64_t head, int64_t t0, int64_t t1) {
    const int32_t* codes = in.k_codes + head * K_WORDS * K_TOKENS;
    for (int64_t t = t0; t < t1;) {
        const int64_t g = t / K_GROUP, end = std::min(t1, (g + 1) * K_GROUP);
        if (g != w.group) fold_keys(w, in, head, g);
        for (; t + STRIP <= end; t += STRIP) {
            prefetch(codes + t, in.v_codes + (head * (V_TOKENS / V_PER) + t / V_PER) * DV);
            key_scores_all<NVECS>(w, codes + t, K_TOKENS, t - t0);
        }
        for (; t < end; t += L) {
            if (t + L <= K_TOKENS) {
                key_scores_all<1>(w, codes + t, K_TOKENS, t - t0);
                continue;
            }
            int32_t part[K_WORDS][L] = {};  // the buffer ends inside this vector
            for (int64_t i = 0; i < K_WORDS; i++) std::memcpy(part[i], codes + i * K_TOKENS + t, (K_TOKENS - t) * 4);
            key_scores_all<1>(w, part[0], L, t - t0);
        }
        t = end;
    }
}

// Scores of NT tokens whose keys are in full precision.
template <int NT> inline void full_score(Work& w, const T* const (&key)[NT], int64_t at) {
    alignas(64) float k[NT][DK_PAD + L];
    for (int i = 0; i < NT; i++)
        for (int64_t d = 0; d < DK; d += L) store(k[i] + d, load_up_to(key[i] + d, DK - d));
    for (int64_t r = 0; r < ROWS; r++) {
        vf s[NT] = {};
        for (int64_t d = 0; d < DK; d += L) {
            const vf q = load<vf>(w.query[r] + d);
#pragma GCC unroll 4
            for (int i = 0; i < NT; i++) s[i] = fma(q, load<vf>(k[i] + d), s[i]);
        }
        for (int i = 0; i < NT; i++) w.score[r][at + i] = sum(s[i]);
    }
}

inline vf apply_mask(vf logit, const uint8_t* mask, int64_t n) {
    const vi allowed = widen(load_bytes(mask, n));
    return allowed != 0 ? logit : splat(NONE);
}
template <class F> inline vf apply_mask(vf logit, const F* mask, int64_t n) { return logit + load_up_to(mask, n); }

inline const MASK* mask_row(const Inputs& in, int64_t head, int64_t r) {
    return in.mask + head / H * MASK_B + (head % H * (HQ / H) + r / Q) * MASK_H + r % Q * MASK_Q;
}

inline vf cap(vf x) {  // SOFTCAP * tanh(x / SOFTCAP); by its series where the quotient would cancel
    const vf z = x / SOFTCAP, y = exp(z * -2.0f), s = z * z;
    vf series = fma(s, splat(62.0f / 2835), splat(-17.0f / 315));
    series = fma(series, s, splat(2.0f / 15));
    series = fma(series, s, splat(-1.0f / 3));
    series = fma(series * s, x, x);
    return abs(z) < 0.25f ? series : SOFTCAP * ((1.0f - y) / (1.0f + y));
}

// x in the lanes [from, to), elsewhere nothing that attention sees.
inline vf only(vf x, int64_t from, int64_t to) {
    const int32_t a = (int32_t)std::clamp<int64_t>(from, 0, L), b = (int32_t)std::clamp<int64_t>(to, 0, L);
    const vi lane = iota();
    return (lane >= a) & (lane < b) ? x : splat(NONE);
}

// Scores to logits of row r over n tokens from t0: softcap, mask, window. Returns the largest, or the
// largest so far; NaN is left out.
inline float logits(Work& w, const Inputs& in, float so_far, int64_t head, int64_t r, int64_t t0, int64_t n) {
    float* score = w.score[r];
    const MASK* mask = HAS_MASK ? mask_row(in, head, w.row0 + r) + t0 : nullptr;
    const int64_t hidden = WINDOW ? in.past + (w.row0 + r) % Q - WINDOW + 1 - t0 : 0;  // tokens before this one
    vf most = splat(so_far);
    for (int64_t i = 0; i < n; i += L) {
        vf x = load<vf>(score + i);
        if (SOFTCAP > 0) x = cap(x);
        if (HAS_MASK) x = apply_mask(x, mask + i, n - i);
        if (n - i < L || hidden > i) x = only(x, hidden - i, n - i);
        most = max(x, most);
        store(score + i, x);
    }
    return max(most);
}

// The online softmax over n tokens from t0, row by row in two passes, so that the sums across lanes that
// end the first do not hold up the second.
inline void weigh(Work& w, const Inputs& in, Rows& rows, int64_t head, int64_t t0, int64_t n) {
    float m[ROWS];
    for (int64_t r = 0; r < ROWS; r++) m[r] = logits(w, in, rows.m[r], head, r, t0, n);
    for (int64_t r = 0; r < ROWS; r++) {
        const float kept = m[r] == rows.m[r] ? 1.0f : std::exp(rows.m[r] - m[r]);
        rows.m[r] = m[r];
        const float base = m[r] == NONE ? 0.0f : m[r];  // all -inf: weights of 0. A NaN stays one throughout
        vf total = splat(0.0f);
        for (int64_t i = 0; i < n; i += L) {
            const vf p = exp_negative<DIGITS == 2>(load<vf>(w.score[r] + i) - base);
            total += p;
            store(w.weight[r] + i, p);
        }
        rows.l[r] = rows.l[r] * kept + sum(total);
        float* acc = rows.acc + r * DV_PAD;
        if (kept != 1.0f)
            for (int64_t d = 0; d < DV_PAD; d += L) store(acc + d, load<vf>(acc + d) * kept);
    }
}

// Fold the scales of channel group g into the weights of n tokens.
inline void fold_values(Work& w, const Inputs& in, int64_t head, int64_t g, int64_t t0, int64_t n) {
    const int64_t at = (head * V_GROUPS + g) * V_TOKENS + t0, padded = (n + V_PER - 1) / V_PER * V_PER;
    vf largest[ROWS] = {}, z[ROWS] = {}, bad = {};
    for (int64_t i = 0; i < n; i += L) {
        const vf s = load_up_to(in.v_scale + at + i, n - i), zeros = load_up_to(in.v_zero + at + i, n - i);
        bad = fma(s, splat(0.0f), bad);
        const vi here = n - i < L ? iota() < (int32_t)(n - i) : splat(-1);
        for (int64_t r = 0; r < ROWS; r++) {
            vf p = load<vf>(w.weight[r] + i);
            p = here ? p : splat(0.0f);
            const vf x = p * s;
            store(w.score[r] + i, x);  // the scores have become weights
            largest[r] = max(abs(x), largest[r]);
            z[r] += p != 0.0f ? p * zeros : p;
        }
    }
    const float nan = spoilt(bad);
    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t i = (n + L - 1) / L * L; i < padded; i += L) store(w.score[r] + i, splat(0.0f));
        w.p_zero[r] = sum(z[r]);
    }
    for (int64_t r = 0; r < ROWS; r++)
        w.p_unit[r] = to_digits<SPAN>(w.score[r], padded, largest[r], w.p_digits[r]) + nan;
}

template <int NR, int NV>
inline void add_values(Work& w, Rows& rows, const int32_t* codes, int64_t words, int64_t row, int64_t d, int64_t left) {
    vf out[NR][NV];
    dots<V_BITS, NR, NV, SPAN>(codes + d, DV, words, w.p_digits + row, out);
    for (int r = 0; r < NR; r++)
        for (int v = 0; v < NV; v++) {
            float* acc = rows.acc + (row + r) * DV_PAD + d + v * L;
            const vf more = fma(out[r][v], splat(w.p_unit[row + r]), splat(w.p_zero[row + r]));
            store_up_to(acc, load<vf>(acc) + more, left - v * L);
        }
}

template <int NV>
inline void add_values_all(Work& w, Rows& rows, const int32_t* codes, int64_t words, int64_t d, int64_t left) {
    for (int64_t r = 0; r + NROWS <= ROWS; r += NROWS) add_values<NROWS, NV>(w, rows, codes, words, r, d, left);
    if constexpr (ROWS % NROWS) add_values<ROWS % NROWS, NV>(w, rows, codes, words, ROWS / NROWS * NROWS, d, left);
}

// Weighted values of n tokens from t0, all in the codes.
inline void quantized_values(Work& w, const Inputs& in, Rows& rows, int64_t head, int64_t t0, int64_t n) {
    const int32_t* codes = in.v_codes + (head * (V_TOKENS / V_PER) + t0 / V_PER) * DV;
    const int64_t words = (n + V_PER - 1) / V_PER;
    for (int64_t g = 0; g < V_GROUPS; g++) {
        fold_values(w, in, head, g, t0, n);
        int64_t d = g * V_GROUP;
        const int64_t end = d + V_GROUP;
        for (; d + NVECS * L <= end; d += NVECS * L) add_values_all<NVECS>(w, rows, codes, words, d, NVECS * L);
        for (; d < end; d += L) add_values_all<1>(w, rows, codes, words, d, end - d);
    }
}

// Weighted values of NT tokens from `at` of the span on, in full precision.
template <int NT> inline void full_value(Work& w, Rows& rows, const T* const (&value)[NT], int64_t at) {
    for (int64_t d = 0; d < DV; d += L) {
        vf x[NT];
        for (int i = 0; i < NT; i++) x[i] = load_up_to(value[i] + d, DV - d);
        for (int64_t r = 0; r < ROWS; r++) {
            float* acc = rows.acc + r * DV_PAD + d;
            vf sum = load<vf>(acc);
#pragma GCC unroll 4
            for (int i = 0; i < NT; i++) sum = fma(splat(w.weight[r][at + i]), x[i], sum);
            store(acc, sum);
        }
    }
}

// A token in full precision.
inline const T* in_window(const Inputs& in, const T* ring, const T* chunk, int64_t head, int64_t t, int64_t dim) {
    if (HAS_NEW && t >= in.past) return chunk + (head * Q + t - in.past) * dim;
    return ring + (head * RING + t % RING) * dim;
}

// Many rows (a chunk): full-precision tokens L at a time, so that what is loaded of them serves all rows.
constexpr bool MANY_ROWS = ROWS >= 16 && SINKS == 0;

template <int NR> inline void scores_of_block(Work& w, const float (*keys)[L], int64_t row, int64_t at) {
    vf s[NR] = {};
    for (int64_t d = 0; d < DK; d++) {
        const vf k = load<vf>(keys[d]);
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) s[r] = fma(splat(w.query[row + r][d]), k, s[r]);
    }
    for (int r = 0; r < NR; r++) store(w.score[row + r] + at, s[r]);
}

inline void full_scores(Work& w, const Inputs& in, int64_t head, int64_t t, int64_t n, int64_t at) {
    alignas(64) float keys[DK][L] = {};  // channels by tokens
    for (int64_t i = 0; i < n; i++) {
        const T* key = in_window(in, in.k_ring, in.k_new, head, t + i, DK);
        for (int64_t d = 0; d < DK; d += L) {
            const vf k = load_up_to(key + d, DK - d);
            for (int64_t j = 0; j < std::min<int64_t>(L, DK - d); j++) keys[d + j][i] = k[j];
        }
    }
    for (int64_t r = 0; r + 8 <= ROWS; r += 8) scores_of_block<8>(w, keys, r, at);
    for (int64_t r = ROWS / 8 * 8; r < ROWS; r++) scores_of_block<1>(w, keys, r, at);
}

template <int NR> inline void values_of_block(Work& w, Rows& rows, const float (*values)[DV_PAD], int64_t row,
                                              int64_t d, int64_t n, int64_t at) {
    vf sum[NR];
    for (int r = 0; r < NR; r++) sum[r] = load<vf>(rows.acc + (row + r) * DV_PAD + d);
    for (int64_t i = 0; i < n; i++) {
        const vf v = load<vf>(values[i] + d);
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) sum[r] = fma(splat(w.weight[row + r][at + i]), v, sum[r]);
    }
    for (int r = 0; r < NR; r++) store(rows.acc + (row + r) * DV_PAD + d, sum[r]);
}

inline void full_values(Work& w, Rows& rows, const Inputs& in, int64_t head, int64_t t, int64_t n, int64_t at) {
    alignas(64) float values[L][DV_PAD];
    for (int64_t i = 0; i < n; i++) {
        const T* value = in_window(in, in.v_ring, in.v_new, head, t + i, DV);
        for (int64_t d = 0; d < DV; d += L) store(values[i] + d, load_up_to(value + d, DV - d));
    }
    for (int64_t d = 0; d < DV; d += L) {
        for (int64_t r = 0; r + 8 <= ROWS; r += 8) values_of_block<8>(w, rows, values, r, d, n, at);
        for (int64_t r = ROWS / 8 * 8; r < ROWS; r++) values_of_block<1>(w, rows, values, r, d, n, at);
    }
}

// Call `use(pointers, t)` for tokens [t0, t1), four at a time and then one by one; `at` says where a token is.
template <class At, class Use> inline void by_tokens(int64_t t0, int64_t t1, At at, Use use) {
    int64_t t = t0;
    for (; t + 4 <= t1; t += 4) {
        const T* const four[] = {at(t), at(t + 1), at(t + 2), at(t + 3)};
        use(four, t);
    }
    for (; t < t1; t++) {
        const T* const one[] = {at(t)};
        use(one, t);
    }
}

// One span: tokens [t0, t1) of one KV head.
inline void attend_span(Work& w, const Inputs& in, Rows& rows, int64_t head, int64_t t0, int64_t t1) {
    const int64_t keys = std::clamp(in.keys_end, t0, t1), values = std::clamp(in.values_end, t0, t1);
    const int64_t first = in.start[head / H];
    const int64_t sink0 = std::clamp(first, t0, t1), sink1 = std::clamp(first + SINKS, t0, t1);
    if (keys > t0) quantized_scores(w, in, head, t0, keys);
    if constexpr (MANY_ROWS)
        for (int64_t t = keys; t < t1; t += L) full_scores(w, in, head, t, std::min<int64_t>(L, t1 - t), t - t0);
    else
        by_tokens(keys, t1, [&](int64_t t) { return in_window(in, in.k_ring, in.k_new, head, t, DK); },
                  [&](const auto& key, int64_t t) { full_score(w, key, t - t0); });
    by_tokens(sink0, sink1, [&](int64_t t) { return in.k_sink + (head * (SINKS + 1) + t - first) * DK; },
              [&](const auto& key, int64_t t) { full_score(w, key, t - t0); });
    weigh(w, in, rows, head, t0, t1 - t0);
    by_tokens(sink0, sink1, [&](int64_t t) { return in.v_sink + (head * (SINKS + 1) + t - first) * DV; },
              [&](const auto& value, int64_t t) { full_value(w, rows, value, t - t0); });
    for (int64_t r = 0; r < ROWS; r++) std::fill(w.weight[r] + sink0 - t0, w.weight[r] + sink1 - t0, 0.0f);
    if constexpr (MANY_ROWS)
        for (int64_t t = values; t < t1; t += L) full_values(w, rows, in, head, t, std::min<int64_t>(L, t1 - t), t - t0);
    else {
        const auto at = [&](int64_t t) { return in_window(in, in.v_ring, in.v_new, head, t, DV); };
        const auto add = [&](const auto& value, int64_t t) { full_value(w, rows, value, t - t0); };
        by_tokens(values, std::min(sink0, t1), at, add);
        by_tokens(std::max(values, sink1), t1, at, add);
    }
    if (values > t0) quantized_values(w, in, rows, head, t0, values - t0);
}

inline void load_queries(Work& w, const Inputs& in, int64_t head, int64_t row0) {
    w.row0 = row0;
    std::memset(w.query, 0, sizeof(w.query));
    std::memset(w.folded, 0, sizeof(w.folded));
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t d = 0; d < DK; d += L)
            store(w.query[r] + d, load_up_to(in.q + (head * ALL_ROWS + row0 + r) * DK + d, DK - d) * SCALE);
    w.group = -1;
}

inline void merge(Rows& into, int64_t r, float m, float l, const float* acc) {
    const float most = std::max(into.m[r], m);
    if (most == NONE) {
        into.l[r] += l;  // 0, or NaN
        return;
    }
    const float a = std::exp(into.m[r] - most), b = std::exp(m - most);
    into.m[r] = most;
    into.l[r] = into.l[r] * a + l * b;
    for (int64_t d = 0; d < DV_PAD; d += L) {
        vf x = load<vf>(into.acc + r * DV_PAD + d) * a;
        store(into.acc + r * DV_PAD + d, acc ? fma(load<vf>(acc + d), splat(b), x) : x);
    }
}

// Tokens past the last one written count as zeros, as the program reads them, where the mask lets them in.
struct Unwritten {
    float m = NONE, l = 0.0f;  // largest logit, sum of exponentials
};

inline bool all_zero(const uint8_t* x, int64_t n) {
    vi seen = {};
    int64_t i = 0;
    for (; i + (int64_t)sizeof(vi) <= n; i += sizeof(vi)) seen |= load<vi>(x + i);
    bool some = any(seen);
    for (; i < n; i++) some |= x[i] != 0;
    return !some;
}
template <class F> inline bool all_zero(const F*, int64_t) { return false; }

// `mask` is one row of the mask. Often the same row is for all heads, so this is done once a row.
inline Unwritten unwritten(const MASK* mask, int64_t length) {
    Unwritten u;
    if (all_zero(mask + length, N - length)) return u;
    vf most = splat(NONE), total = splat(0.0f);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t t = length; t < N; t += L) {
            vf x = apply_mask(splat(0.0f), mask + t, N - t);
            if (N - t < L) x = only(x, 0, N - t);
            if (pass == 0) most = max(x, most);
            else total += exp(x - u.m);
        }
        u.m = max(most);
        if (u.m == NONE) return u;
    }
    u.l = sum(total);
    return u;
}

inline void finish(const Inputs& in, Rows& rows, const Unwritten* rest, int64_t head, int64_t row0) {
    for (int64_t r = 0; r < ROWS; r++) {
        Unwritten u;
        if (HAS_MASK) u = rest[(mask_row(in, head, row0 + r) - in.mask) / N];
        else if (in.length < N) u.m = 0.0f, u.l = (float)(N - in.length);
        if (u.m != NONE) merge(rows, r, u.m, u.l, nullptr);
        if (HAS_SINK_LOGITS) merge(rows, r, to_float(in.sink_logits[head % H * (HQ / H) + (row0 + r) / Q]), 1.0f, nullptr);
        const float scale = rows.m[r] == NONE && rows.l[r] == 0.0f ? 0.0f : 1.0f / rows.l[r];
        T* out = in.out + (head * ALL_ROWS + row0 + r) * DV;
        for (int64_t d = 0; d < DV; d++) out[d] = from_float<T>(rows.acc[r * DV_PAD + d] * scale);
    }
}

void attend(Inputs in) {
    in.length = in.past + Q;
    in.keys_end = in.past / RESIDUAL * RESIDUAL;
    in.values_end = std::max<int64_t>(in.past - RESIDUAL, 0);
    const int64_t spans = (in.length + SPAN - 1) / SPAN, blocks = B * H * ROW_BLOCKS;
    const int team = blocks * ROWS * in.length < 8192 ? 1 : max_threads();
    // Tokens are split, too, so that there are pieces enough for threads that are not equally fast.
    const int64_t wanted = team == 1 ? 1 : (16 * team + blocks - 1) / blocks;
    const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(SPAN > 256 ? spans : spans / 2, 1));
    AlignedFloats parts(blocks * splits * Rows::SIZE);
    auto part = [&](int64_t i) { return Rows(parts.data + i * Rows::SIZE); };
    std::unique_ptr<Unwritten[]> rest(new Unwritten[MASK_ROWS]);
#pragma omp parallel num_threads(team) if (team > 1)
    {
        std::unique_ptr<Work> w(new Work);
        if (HAS_MASK && in.length < N) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < MASK_ROWS; i++) rest[i] = unwritten(in.mask + i * N, in.length);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks * splits; i++) {
            const int64_t block = i / splits, split = i % splits, head = block / ROW_BLOCKS;
            Rows rows = part(i);
            rows.clear();
            load_queries(*w, in, head, block % ROW_BLOCKS * ROWS);
            const int64_t end = std::min(in.length, spans * (split + 1) / splits * SPAN);
            for (int64_t t = spans * split / splits * SPAN; t < end; t += SPAN) {
                attend_span(*w, in, rows, head, t, std::min(end, t + SPAN));
            }
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            Rows rows = part(block * splits);
            for (int64_t s = 1; s < splits; s++) {
                Rows other = part(block * splits + s);
                for (int64_t r = 0; r < ROWS; r++) merge(rows, r, other.m[r], other.l[r], other.acc + r * DV_PAD);
            }
            finish(in, rows, rest.get(), block / ROW_BLOCKS, block % ROW_BLOCKS * ROWS);
        }
    }
}

}  // namespace xq
