// Other ways to read codes, in the place of quantized_values and quantized_scores: what benchmarks/code_paths.py times.
//
// Each does what the product does around it (scales folded into the weights, digits, sums of integers), so that times
// differ by the codes alone. Constants of one problem and the product's headers stand in front: one KV head, ROWS
// queries, values of one group, 1 bit per element.
namespace xq {

constexpr int64_t PIECE = 8;  // channels of a byte
static_assert(V_GROUPS == 1 && V_BITS == 1, "");

// 256 vectors of PIECE numbers as bytes: unsigned, BIAS added.
#if defined(XQ_DOT_BYTES)
constexpr int BIAS = 128;
#else
constexpr int BIAS = 32;  // 6 bits: sums of four products stay in 16 bits
#endif
struct Book {
    alignas(64) uint8_t of_channel[PIECE][256];
    // An entry's numbers stand at byte 4 of each word, so that a load n bytes before it finds them n bytes further on.
    alignas(64) uint8_t entry[256][64];
};

// Digits times bytes are sum p s (byte); what was asked for is sum p s (byte - BIAS) / unit.
inline float* output(RunningSoftmax& softmax, int64_t row) { return softmax.acc + row * ACC + CODES_AT; }
inline float shift_of(const Scratch& scratch, int64_t row) { return 2.0f * BIAS * scratch.p_zero[row]; }

// Bytes of four tokens, whose codes are the bytes of `code`, in each lane: lanes are channels. `high` has the codes of
// the next piece, for the upper half of 16 lanes.
ALWAYS_INLINE vi entries(const Book& book, uint64_t code, uint64_t high) {
    vi found = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const uint8_t* entry = book.entry[code >> 8 * j & 0xff] + 4 - j;
#if XQ_LANES == 16
        const __m256i low = _mm256_loadu_si256((const __m256i*)entry);
        const __m256i* other = (const __m256i*)(book.entry[high >> 8 * j & 0xff] + 4 - j);
        found |= (vi)_mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(other), 1);
#else
        found |= load<vi>(entry);
#endif
    }
    return found;
}

// The sums of each digit as one number.
template <int NV> ALWAYS_INLINE void join_digits(const vi (&sums)[ROWS][V_DIGITS][NV], vf (&out)[ROWS][NV]) {
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) {
            out[r][v] = splat(0.0f);
            for (int d = 0; d < V_DIGITS; d++)
                out[r][v] = fma(out[r][v], splat(256.0f), __builtin_convertvector(sums[r][d][v], vf));
        }
}

// Weighted values by a table of entries: codes [DV / PIECE][pitch] bytes.
template <int NV>
inline void table_values(Scratch& scratch, RunningSoftmax& softmax, const Book& book, const uint8_t* codes,
                         int64_t pitch, int64_t n) {
    for (int64_t d = 0; d < DV; d += NV * L) {
        const uint8_t* code = codes + d / PIECE * pitch;
        vi sums[ROWS][V_DIGITS][NV] = {};
        for (int64_t t = 0; t < n; t += 8) {
            vi byte[2][NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) {
                const uint8_t* piece = code + v * L / PIECE * pitch + t;
                const uint64_t low = load<uint64_t>(piece), high = L == 16 ? load<uint64_t>(piece + pitch) : 0;
                byte[0][v] = entries(book, low, high), byte[1][v] = entries(book, low >> 32, high >> 32);
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
                for (int k = 0; k < V_DIGITS; k++) {
                    const int8_t* digits = scratch.p_digits[r][k] + t;
                    const vi first = splat(load_word(digits)), second = splat(load_word(digits + 4));
#pragma GCC unroll 2
                    for (int v = 0; v < NV; v++) {
                        vi& sum = sums[r][k][v];
#ifdef XQ_DOT_BYTES
                        sum = dot_bytes<8>(dot_bytes<8>(sum, byte[0][v], first), byte[1][v], second);
#else
                        sum +=
                            add_pairs(multiply_add_pairs(byte[0][v], first) + multiply_add_pairs(byte[1][v], second));
#endif
                    }
                }
        }
        vf out[ROWS][NV];
        join_digits(sums, out);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++) {
                float* acc = output(softmax, r) + d + v * L;
                store(acc, load<vf>(acc) + fma(out[r][v], splat(scratch.p_unit[0][r]), splat(shift_of(scratch, r))));
            }
    }
}

#ifdef __AVX512VBMI__
struct Table {  // of 256 bytes, in registers
    __m512i part[4];
    explicit Table(const uint8_t* bytes) {
        for (int i = 0; i < 4; i++) part[i] = _mm512_load_si512(bytes + 64 * i);
    }
    inline __m512i operator()(__m512i index) const {
        const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low,
                                      _mm512_permutex2var_epi8(part[2], index, part[3]));
    }
};

// Lane i: the sum of the lanes of x[i].
ALWAYS_INLINE __m512i sums_of_lanes(__m512i (&x)[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        x[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]),
                                _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        x[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(x[2 * i], x[2 * i + 1]),
                                _mm512_unpackhi_epi64(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        x[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(x[2 * i], x[2 * i + 1], 0x44),
                                _mm512_shuffle_i32x4(x[2 * i], x[2 * i + 1], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x[0], x[1], 0x88), _mm512_shuffle_i32x4(x[0], x[1], 0xdd));
}

// Add two channels from d on, whose bytes for 64 tokens from t on `bytes(t, c)` gives; lanes are tokens.
template <class F>
ALWAYS_INLINE void add_two_channels(Scratch& scratch, RunningSoftmax& softmax, int64_t d, int64_t n, const F& bytes) {
    static_assert(ROWS == 4 && V_DIGITS == 2, "");
    __m512i sums[16] = {};  // [digit][row][channel]
    for (int64_t t = 0; t < n; t += 64) {
        __m512i byte[2];
        bytes(t, byte);
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                const __m512i digits = _mm512_load_si512(scratch.p_digits[r][k] + t);
#pragma GCC unroll 2
                for (int c = 0; c < 2; c++) {
                    __m512i& sum = sums[k * 8 + r * 2 + c];
                    sum = _mm512_dpbusd_epi32(sum, byte[c], digits);
                }
            }
    }
    alignas(64) float total[16];
    _mm512_store_ps(total, _mm512_cvtepi32_ps(sums_of_lanes(sums)));
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 2; c++)
            output(softmax, r)[d + c] +=
                (total[r * 2 + c] * 256.0f + total[8 + r * 2 + c]) * scratch.p_unit[0][r] + shift_of(scratch, r);
}

// Weighted values by tables in registers, of two channels at a time: 64 tokens in three instructions.
inline void register_values(Scratch& scratch, RunningSoftmax& softmax, const Book& book, const uint8_t* codes,
                            int64_t pitch, int64_t n) {
    for (int64_t d = 0; d < DV; d += 2) {
        const Table first(book.of_channel[d % PIECE]), second(book.of_channel[d % PIECE + 1]);
        const uint8_t* code = codes + d / PIECE * pitch;
        add_two_channels(scratch, softmax, d, n, [&](int64_t t, __m512i(&byte)[2]) {
            const __m512i index = _mm512_loadu_si512(code + t);
            byte[0] = first(index), byte[1] = second(index);
        });
    }
}

// Weighted values by a trellis of 256 states: codes [DV * K][pitch] bits, tokens in neighbouring bits. The state of a
// channel is the latest 8 bits, which begin again at the last channels: a ring.
template <int K>
inline void trellis_values(Scratch& scratch, RunningSoftmax& softmax, const uint8_t* table, const uint64_t* codes,
                           int64_t pitch, int64_t n) {
    constexpr int AT_ONCE = 4;  // vectors of tokens: each waits for its state before
    alignas(64) static uint8_t bytes[DV][SPAN];
    const Table value(table);
    const __m512i one = _mm512_set1_epi8(1);
    for (int64_t t = 0; t < n; t += 64 * AT_ONCE) {
        __m512i state[AT_ONCE] = {};
        const auto next = [&](int64_t bit) {
            const uint64_t* word = codes + bit * (pitch / 64) + t / 64;
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; i++) {
                state[i] = _mm512_add_epi8(state[i], state[i]);
                state[i] = _mm512_mask_add_epi8(state[i], word[i], state[i], one);
            }
        };
        for (int64_t bit = K * DV - 8 + K; bit < K * DV; bit++) next(bit);
        for (int64_t d = 0; d < DV; d++) {
#pragma GCC unroll 2
            for (int k = 0; k < K; k++) next(K * d + k);
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; i++) _mm512_store_si512(bytes[d] + t + 64 * i, value(state[i]));
        }
    }
    for (int64_t d = 0; d < DV; d += 2)
        add_two_channels(scratch, softmax, d, n, [&](int64_t t, __m512i(&byte)[2]) {
            for (int c = 0; c < 2; c++) byte[c] = _mm512_load_si512(bytes[d + c] + t);
        });
}
#endif

// Scores of keys that were quantized before RoPE, n tokens from t0 on: codes of 2 bits (all channels alike, where the
// product has ranks), dequantized, turned by cos and sin [n, DK / 2] (lanes are tokens: [DK / 2][pitch]), multiplied.
inline void turned_scores(Scratch& scratch, const Inputs& in, const float (&scaled)[2][DK], const float* cosines,
                          const float* sines, const int32_t* order, int64_t pitch, int64_t t0, int64_t n,
                          int64_t offset) {
    constexpr int64_t WORDS = DK / 16;
    alignas(64) float key[DK][L];
    for (int64_t t = t0; t < t0 + n; t += L) {
        for (int64_t w = 0; w < WORDS; w++) {
            const vu word = load<vu>(in.k_codes + w * in.k_tokens + t);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int64_t rank = w * 16 + i;
                const vi code = (vi)(word >> (8 * (i % 4) + 2 * (i / 4))) & splat(3);
                const float s = scaled[0][rank], z = scaled[1][rank];
                store(key[order[rank]], fma(__builtin_convertvector(code, vf), splat(s), splat(z)));
            }
        }
        vf sum[ROWS] = {};
        for (int64_t d = 0; d < DK / 2; d++) {
            const vf c = load<vf>(cosines + d * pitch + t), s = load<vf>(sines + d * pitch + t);
            const vf a = load<vf>(key[d]), b = load<vf>(key[d + DK / 2]);
            const vf x = fma(a, c, -(b * s)), y = fma(b, c, a * s);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
                sum[r] = fma(splat(scratch.query[r][d + DK / 2]), y, fma(splat(scratch.query[r][d]), x, sum[r]));
        }
        for (int r = 0; r < ROWS; r++) store(scratch.score[r] + offset + t - t0, sum[r]);
    }
}

// What a run reads, by pointers into numpy arrays.
struct Data {
    const int32_t* codes;
    const uint8_t *scales, *bytes;
    const uint64_t* planes;
    const Book* book;
    const float* weights;
    const int32_t* k_codes;
    const uint8_t *k_scale, *k_zero;
    const float *cosines, *sines;
    const int32_t* order;
};

enum Values { PRESENT, TABLE, IN_REGISTERS, TRELLIS_1, TRELLIS_2 };

// Values of the span from t on, by one of the ways; false: not on this machine.
inline bool add_span(int way, Scratch& scratch, RunningSoftmax& softmax, const Inputs& in, const Data& data, int64_t t,
                     int64_t tokens) {
    if (way == PRESENT) {
        quantized_values(scratch, in, softmax, 0, t, SPAN);
        return true;
    }
    for_rows([&](int64_t row, auto rows) { fold_value_scales<rows()>(scratch, in, 0, 0, t, SPAN, row); });
    if (way == TABLE) {
        table_values<L == 16 ? 2 : 1>(scratch, softmax, *data.book, data.bytes + t, tokens, SPAN);
        return true;
    }
#ifdef __AVX512VBMI__
    const uint64_t* planes = data.planes + t / 64;
    const uint8_t* table = data.book->of_channel[0];
    if (way == IN_REGISTERS) register_values(scratch, softmax, *data.book, data.bytes + t, tokens, SPAN);
    else if (way == TRELLIS_1) trellis_values<1>(scratch, softmax, table, planes, tokens, SPAN);
    else trellis_values<2>(scratch, softmax, table, planes, tokens, SPAN);
    return true;
#else
    return false;
#endif
}

// Scores of the span from t on, by keys that are turned as they are read.
inline void turned_span(Scratch& scratch, const Inputs& in, const Data& data, int64_t t, int64_t tokens) {
    alignas(64) float scaled[2][DK];  // scales of a group, and zero points
    for (int64_t i = 0; i < SPAN; i += K_GROUP) {
        const int64_t row = (t + i) / K_GROUP * DK;
        for (int64_t d = 0; d < DK; d += L) {
            const vf s = load_scales(data.k_scale + row + d, L);
            store(scaled[0] + d, s);
            store(scaled[1] + d, s * (load_mids(data.k_zero + row + d, L) - 1.5f));
        }
        turned_scores(scratch, in, scaled, data.cosines, data.sines, data.order, tokens, t + i, K_GROUP, i);
    }
}

inline void load_problem(Scratch& scratch, Inputs& in, const Data& data, float query_scale, int64_t tokens) {
    in.batch = in.mask_batch = 1, in.max_len = in.k_tokens = in.v_tokens = tokens;
    in.v_codes = data.codes, in.v_scale = data.scales;
    in.k_codes = data.k_codes, in.k_scale = data.k_scale, in.k_zero = data.k_zero;
    for (int64_t r = 0; r < ROWS; r++) {
        std::memcpy(scratch.weight[r], data.weights + r * SPAN, SPAN * sizeof(float));
        for (int64_t d = 0; d < DK; d++) {
            scratch.query[r][d] = query_scale * data.weights[r * SPAN + d];
            scratch.ranked[r][d] = query_scale * data.weights[r * SPAN + data.order[d]];
        }
    }
    scratch.groups = 0;
}

}  // namespace xq

// One pass over `tokens` tokens of one KV head, with the same `weights` [ROWS, SPAN] in every span.

// Weighted values: out [ROWS, DV].
extern "C" int values(int way, const xq::Data* data, float* out, int64_t tokens) {
    using namespace xq;
    static Scratch scratch;
    alignas(64) static float sums[RunningSoftmax::SIZE];
    RunningSoftmax softmax(sums);
    softmax.clear();
    Inputs in{};
    load_problem(scratch, in, *data, 1.0f, tokens);
    for (int64_t t = 0; t < tokens; t += SPAN)
        if (!add_span(way, scratch, softmax, in, *data, t, tokens)) return 1;
    for (int64_t r = 0; r < ROWS; r++) std::memcpy(out + r * DV, output(softmax, r), DV * sizeof(float));
    return 0;
}

// Scores: out [ROWS], the sum over every 64th token.
extern "C" int keys(int turned, const xq::Data* data, float* out, int64_t tokens) {
    using namespace xq;
    static Scratch scratch;
    Inputs in{};
    load_problem(scratch, in, *data, 1.0f, tokens);
    std::fill(out, out + ROWS, 0.0f);
    for (int64_t t = 0; t < tokens; t += SPAN) {
        if (turned) turned_span(scratch, in, *data, t, tokens);
        else quantized_scores(scratch, in, 0, t, t + SPAN);
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t i = 0; i < SPAN; i += 64) out[r] += scratch.score[r][i];
    }
    return 0;
}

// Scores, softmax and values: `way` / 8 says whether keys are turned, `way` % 8 which values. Nothing comes out.
extern "C" int decode(int way, const xq::Data* data, float*, int64_t tokens) {
    using namespace xq;
    static Scratch scratch;
    alignas(64) static float sums[RunningSoftmax::SIZE];
    RunningSoftmax softmax(sums);
    softmax.clear();
    Inputs in{};
    load_problem(scratch, in, *data, 1e-3f, tokens);
    for (int64_t t = 0; t < tokens; t += SPAN) {
        if (way / 8) turned_span(scratch, in, *data, t, tokens);
        else quantized_scores(scratch, in, 0, t, t + SPAN);
        online_softmax(scratch, in, softmax, 0, t, SPAN);
        if (!add_span(way % 8, scratch, softmax, in, *data, t, tokens)) return 1;
    }
    return 0;
}
