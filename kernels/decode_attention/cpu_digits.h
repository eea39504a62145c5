// Integer dot products of packed codes with floating-point numbers, which are split into digits for that.
#pragma once
#include "cpu_problem.h"

namespace xq {

constexpr int CHAINS = 4;  // vectors of numbers, each of which waits for the one before it in its chain

// The first n lanes of v as digits from element i on. A digit is the low byte, taken as signed; the rest is carried.
template <int DIGITS, int64_t PITCH>
ALWAYS_INLINE void store_digits(vi v, int8_t (*digits)[PITCH], int64_t i, int64_t n) {
    for (int d = DIGITS - 1; d >= 0; d--, v = (v + 128) >> 8) store_up_to(digits[d] + i, narrow(v), n);
}

// CHAINS vectors likewise.
template <int DIGITS, int64_t PITCH>
ALWAYS_INLINE void store_digits(const vi (&v)[CHAINS], int8_t (*digits)[PITCH], int64_t i) {
#ifdef XQ_PACK
    if constexpr (DIGITS == 1) {
        store(digits[0] + i, pack_shorts(pack_ints(v[0], v[1]), pack_ints(v[2], v[3])));
        return;
    }
    if constexpr (DIGITS == 2) {  // which make a short
        const vs a = pack_ints(v[0], v[1]), b = pack_ints(v[2], v[3]);
        store(digits[0] + i, pack_shorts((a + 128) >> 8, (b + 128) >> 8));
        store(digits[1] + i, pack_shorts((a << 8) >> 8, (b << 8) >> 8));
        return;
    }
#endif
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; chain++) store_digits<DIGITS>(v[chain], digits, i + chain * L, L);
}

// Numbers i to n of NR rows x, a multiple of four, as DIGITS digits to the base 256; `unit` gets what the last digit of
// each row stands for. `most` is the largest |x|. CARRY: what rounding leaves goes on to a later number of the same
// lane, as many small weights beside a large one must not all be rounded the same way.
template <bool CARRY, int DIGITS, int NR, int64_t X_PITCH, int64_t PITCH>
inline void to_digits(const float (*x)[X_PITCH], int64_t i, int64_t n, const float (&most)[NR],
                      int8_t (*digits)[DIGITS][PITCH], float* unit) {
    // Leaves every digit in -128 .. 127.
    constexpr float top = DIGITS == 1 ? 127.0f : DIGITS == 2 ? 32512.0f : 4161536.0f;
    vf scale[NR], lost[NR][CHAINS] = {};
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++) scale[r] = splat(most[r] > 0.0f ? top / most[r] : 0.0f), unit[r] = most[r] * (1 / top);
    const auto rounded = [&](int r, int chain, int64_t at) __attribute__((always_inline)) {
        if constexpr (!CARRY) return round_to_int(load<vf>(x[r] + at) * scale[r]);
        const vf exact = fma(load<vf>(x[r] + at), scale[r], lost[r][chain]);
        // 127.5 would be 128, which no digit is (-127.5 may be -128); so the largest comes out as it is.
        const vi v = round_to_int(DIGITS == 1 ? exact > top ? splat(top) : exact : exact);
        lost[r][chain] = exact - __builtin_convertvector(v, vf);
        return v;
    };
    for (; i + CHAINS * L <= n; i += CHAINS * L)
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) {
            vi v[CHAINS];
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; chain++) v[chain] = rounded(r, chain, i + chain * L);
            store_digits<DIGITS>(v, digits[r], i);
        }
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; chain++, i += L) {
        if (i >= n) break;
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) store_digits<DIGITS>(rounded(r, chain, i), digits[r], i, n - i);
    }
}

// 0, or NaN if there was an infinity or a NaN among the scales, whose sum times 0 is `zero_or_nan`: digits cannot
// say so, and a row that sees such a scale is NaN.
inline float nan_if_not_finite(vf zero_or_nan) {
    return any(zero_or_nan != zero_or_nan) ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
}

// Rows that are taken at once where nothing is in the way of their sums but the number of registers.
constexpr int ROWS_AT_ONCE = REGISTERS == 32 ? 4 : 2;
// Rows and vectors of codes whose dot products are taken at once: their sums fill the registers. Where digits are read
// as they are multiplied, vectors need not share them, so rows share the codes.
constexpr int DOT_ROWS = SPREAD_DIGITS ? (int)std::min<int64_t>(ROWS, 4) : ROWS_AT_ONCE;
template <int DIGITS> constexpr int dot_vectors(int64_t lanes) {  // of which no more than `lanes` share scales
    const int many = DIGITS == 1 ? 8 : 4;
    const int most = SPREAD_DIGITS ? std::min(many / DOT_ROWS, 4) : L < 16 && ROWS == 1 ? 4 : many / 2;
    return (int)std::clamp<int64_t>(lanes / L, 1, most);
}
constexpr int K_VECTORS = dot_vectors<K_DIGITS>(K_GROUP), V_VECTORS = dot_vectors<V_DIGITS>(V_GROUP);

// Call `use(row, NR)` for blocks of the rows in use, NR a constant: AT_ONCE or what is left.
template <int AT_ONCE = ROWS_AT_ONCE, class Use> ALWAYS_INLINE void for_rows(const Scratch& scratch, Use use) {
    const int64_t end = scratch.rows_in_use();
    if constexpr (ROWS >= AT_ONCE)  // or compilers warn of what is never run
        for (int64_t r = 0; r + AT_ONCE <= ROWS && r < end; r += AT_ONCE)
            use(r, std::integral_constant<int, AT_ONCE>());
    if constexpr (ROWS % AT_ONCE) use(ROWS / AT_ONCE * AT_ONCE, std::integral_constant<int, ROWS % AT_ONCE>());
}

// Digits of NR rows as dot products read them, four neighbours at a time: where they are, in rows of PITCH bytes, or
// [fours][NR][DIGITS] vectors, in each lane the same.
template <int NR, int DIGITS, int64_t PITCH> struct Digits {
    const int8_t* data;
    ALWAYS_INLINE vi four(int r, int d, int64_t index) const {
        if constexpr (SPREAD_DIGITS) return load<vi>(data + ((index * NR + r) * DIGITS + d) * sizeof(vi));
        else return splat(load_word(data + (r * DIGITS + d) * PITCH + index * 4));
    }
};

// Those of n numbers from `first` on; `spread` holds them where they have to be written down once more.
template <int NR, int DIGITS, int64_t PITCH>
ALWAYS_INLINE Digits<NR, DIGITS, PITCH> digits_of(const int8_t (*digits)[DIGITS][PITCH], int64_t first, int64_t n,
                                                  int8_t* spread) {
    if constexpr (SPREAD_DIGITS) {
        int8_t* to = spread;
        for (int64_t i = first; i < first + n; i += 4)
#pragma GCC unroll 4
            for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
                for (int d = 0; d < DIGITS; d++, to += sizeof(vi)) store(to, splat(load_word(digits[r][d] + i)));
        return {spread};
    } else return {digits[0][0] + first};
}

// Sums of `codes` codes of up to BITS bits times digits of NR rows, by lane, over NV vectors.
template <int NR, int NV, int DIGITS, int BITS, int64_t CODES> struct Sums {
    // Both digits in one total, where that has room for the largest: fewer registers, and nothing to join in the end.
    static constexpr bool JOINED =
        SPREAD_DIGITS && DIGITS == 2 && BITS < 8 && (CODES << BITS) < std::numeric_limits<int32_t>::max() / 32768;
    static constexpr int TOTALS = JOINED ? 1 : DIGITS;
    vi total[NR][TOTALS][NV] = {};
    typename Dot<7>::Sum part[NR][DIGITS][NV] = {};  // what is not in the total yet
    int64_t used = 0;                                // of Dot<7>::ROOM

    template <class F> static ALWAYS_INLINE void each_total(F f) {
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int d = 0; d < TOTALS; d++)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) f(r, d, v);
    }

    // Has to be called before codes are added whose largest, summed over those of one byte, are `more`.
    ALWAYS_INLINE void reserve(int64_t more) {
        if (used + more > Dot<7>::ROOM) finish();
        used += more;
    }

    ALWAYS_INLINE void finish() {
        each_total([&](int r, int d, int v) __attribute__((always_inline)) {
#ifdef XQ_SPREAD_DIGITS
            if constexpr (JOINED) {
                total[r][0][v] += add_pairs(part[r][0][v], 256) + add_pairs(part[r][1][v]);
                part[r][0][v] = part[r][1][v] = vs{};
                return;
            }
#endif
            if constexpr (!std::is_same_v<typename Dot<7>::Sum, vi>)
                total[r][d][v] += Dot<7>::total(part[r][d][v]), part[r][d][v] = typename Dot<7>::Sum{};
        });
        used = 0;
    }

    // What planes of higher fields gave, in units of a field of FIELD bits that follows it.
    template <int FIELD> ALWAYS_INLINE void shift() {
        finish();
        each_total([&](int r, int d, int v) __attribute__((always_inline)) { total[r][d][v] *= 1 << FIELD; });
    }

    // Add codes of FIELD bits, a byte each, times the digits numbered `four`.
    template <int FIELD, int64_t PITCH>
    ALWAYS_INLINE void add(const vi (&code)[NV], Digits<NR, DIGITS, PITCH> digits, int64_t four) {
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; d++) {
                const vi digit = digits.four(r, d, four);
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++)
                    if constexpr (std::is_same_v<typename Dot<FIELD>::Sum, vi>)
                        total[r][d][v] = Dot<FIELD>::add(total[r][d][v], code[v], digit);
                    else part[r][d][v] = Dot<FIELD>::add(part[r][d][v], code[v], digit);
            }
    }

    // Add words of codes, `stride` apart, times the digits from number `four` on; lanes are the other axis.
    template <int FIELD, int64_t PITCH>
    ALWAYS_INLINE void add_words(const int32_t* codes, int64_t stride, int64_t words, Digits<NR, DIGITS, PITCH> digits,
                                 int64_t four) {
        constexpr int PLANES = 8 / FIELD, LARGEST = PLANES * ((1 << FIELD) - 1);
        constexpr int64_t AT_ONCE = std::max<int64_t>(Dot<FIELD>::ROOM / LARGEST, 1);
        const vi mask = splat((int32_t)(0x01010101u * ((1u << FIELD) - 1)));
        for (int64_t first = 0; first < words; first += AT_ONCE) {
            const int64_t end = std::min(words, first + AT_ONCE);
            if constexpr (FIELD < 8) reserve((end - first) * LARGEST);
            for (int64_t w = first; w < end; w++) {
                vu word[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) {
                    word[v] = load<vu>(codes + w * stride + v * L);
#ifdef XQ_FINISH_NOW
                    XQ_FINISH_NOW(word[v]);
#endif
                }
#pragma GCC unroll 8
                for (int j = 0; j < PLANES; j++) {
                    vi code[NV];
#pragma GCC unroll 4
                    for (int v = 0; v < NV; v++)
                        code[v] = FIELD == 8 ? (vi)word[v] : (vi)(word[v] >> (FIELD * j)) & mask;
                    add<FIELD>(code, digits, four + w * PLANES + j);
                }
            }
        }
    }

    // The same for the codes of ranked keys, which have up to 7 bits and may be spread over planes. What needs no
    // putting together is left to loops: unrolled code is large, and a processor reads only so much of it in time.
    template <int64_t PITCH>
    ALWAYS_INLINE void add_mixed(const int32_t* codes, int64_t stride, Digits<NR, DIGITS, PITCH> digits) {
#pragma GCC unroll 16
        for (const Plain& plain : PLAIN) {
            const int32_t* words = codes + plain.word * stride;
            if (plain.width == 4) add_words<4>(words, stride, plain.words, digits, plain.element / 4);
            if (plain.width == 2) add_words<2>(words, stride, plain.words, digits, plain.element / 4);
            if (plain.width == 1) add_words<1>(words, stride, plain.words, digits, plain.element / 4);
        }
        vi code[NV] = {};
        uint32_t largest = 0;
#pragma GCC unroll 128
        for (const Piece& piece : PIECES) {
            largest |= piece.mask & 0xff;
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                const vu word = load<vu>(codes + piece.word * stride + v * L);
                code[v] |= (vi)((piece.shift < 0 ? word << -piece.shift : word >> piece.shift) & piece.mask);
            }
            if (!piece.last) continue;
            reserve(largest);
            add<7>(code, digits, piece.element / 4);
            largest = 0;
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) code[v] = vi{};
        }
    }

    // The digits' totals as one number each.
    ALWAYS_INLINE void join(vf (&out)[NR][NV]) const {
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                vf x = __builtin_convertvector(total[r][0][v], vf);
                for (int d = 1; d < TOTALS; d++) x = fma(x, splat(256.0f), __builtin_convertvector(total[r][d][v], vf));
                out[r][v] = x;
            }
    }
};

// Take the middles of codes times n numbers of one digit from z, where the zero points are those of codes about zero.
// So what a digit leaves is lost for what codes are apart from their middles, which is small and as often less as more.
template <class Largest>
ALWAYS_INLINE vf without_middles(vf z, const int8_t* digits, int64_t n, float unit, Largest largest) {
    vi sum = {};
    for (int64_t i = 0; i < n; i += sizeof(vi))
        sum += Dot<7>::total(Dot<7>::add(typename Dot<7>::Sum{}, largest(i), load<vi>(digits + i)));
    return fma(__builtin_convertvector(sum, vf), splat(-0.5f * unit), z);
}

}  // namespace xq
