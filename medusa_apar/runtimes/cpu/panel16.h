// Products of rows of int16 with a panel of them, summed in int32: attention over a tile that several rows share.
//
//   panel [depth / 2][WIDTH columns][2]   keys: depth is the head's dimensions, columns are places of the path
//                                         values: depth is places, columns are dimensions
//
// Laid out so, no sum goes across lanes, and a vector that was read serves all of a KV head's queries. The sums are
// those that `step_cache.h` takes place by place, bit by bit, since they are of integers.
#pragma once

#include "int16.h"

namespace mapar {

constexpr int WIDTH = 64;                    // columns of a panel
constexpr int AT_ONCE = LANES == 8 ? 2 : 4;  // vectors of sums for each of three rows: 6 of 16 registers, 12 of 32

// Adds to each lane two products: of a panel's pair and a row's.
inline void add_pair(vi& sums, const vi& panel, int32_t row) {
#if defined(__AVX512VNNI__)
    sums = (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)panel, _mm512_set1_epi32(row));
#elif defined(__AVX512F__) && defined(__AVX512BW__)
    sums += (vi)_mm512_madd_epi16((__m512i)panel, _mm512_set1_epi32(row));
#elif defined(__AVX2__)
    sums += (vi)_mm256_madd_epi16((__m256i)panel, _mm256_set1_epi32(row));
#elif defined(__aarch64__)
    const int16x8_t pairs = vreinterpretq_s16_s32((int32x4_t)panel), pair = vreinterpretq_s16_s32(vdupq_n_s32(row));
    const int32x4_t low = vmull_s16(vget_low_s16(pairs), vget_low_s16(pair)), high = vmull_high_s16(pairs, pair);
    sums += (vi)vpaddq_s32(low, high);
#else
    int16_t pair[2], pairs[WIDE];
    std::memcpy(pair, &row, sizeof row);
    std::memcpy(pairs, &panel, sizeof panel);
    for (int i = 0; i < LANES; i++) sums[i] += pairs[2 * i] * pair[0] + pairs[2 * i + 1] * pair[1];
#endif
}

// Sums of R rows [depth] at AT_ONCE vectors of columns. By itself, so that the compiler has all registers for it.
template <int R>
__attribute__((noinline)) void panel_sums(const int16_t* panel, const int16_t* const* rows, int depth, vi (*out)[AT_ONCE]) {
    vi sums[R][AT_ONCE] = {};  // no index of it may be a variable's
    for (int d = 0; d < depth; d += 2, panel += 2 * WIDTH) {
        vi both[AT_ONCE];
#pragma GCC unroll 4
        for (int v = 0; v < AT_ONCE; v++) std::memcpy(&both[v], panel + 2 * v * LANES, sizeof(vi));
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) {
            int32_t row;
            std::memcpy(&row, rows[r] + d, sizeof row);
#pragma GCC unroll 4
            for (int v = 0; v < AT_ONCE; v++) add_pair(sums[r][v], both[v], row);
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < AT_ONCE; v++) out[r][v] = sums[r][v];
}

// Calls use(row, first column, sums) with LANES sums each, for R rows and at least `columns` columns.
template <int R, class Use>
inline void panel_products(const int16_t* panel, const int16_t* const* rows, int depth, int columns, Use use) {
    for (int first = 0; first < columns; first += AT_ONCE * LANES) {
        vi sums[R][AT_ONCE];
        panel_sums<R>(panel + 2 * first, rows, depth, sums);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < AT_ONCE && first + v * LANES < columns; v++) use(r, first + v * LANES, sums[r][v]);
    }
}

// Columns `rows[0]` to `rows[count - 1]`, each of `depth` int16; those behind them keep what they held.
inline void pack_columns(const int16_t* const* rows, int count, int depth, int16_t* panel) {
    int column = 0;
#if defined(__AVX2__)
    for (; column + 4 <= count; column += 4)
        for (int d = 0; d < depth; d += 8) {  // four rows' four pairs, turned
            __m128i r[4];
            for (int i = 0; i < 4; i++) r[i] = _mm_loadu_si128((const __m128i*)(rows[column + i] + d));
            const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]),
                          c = _mm_unpackhi_epi32(r[0], r[1]), e = _mm_unpackhi_epi32(r[2], r[3]);
            int16_t* out = panel + d * WIDTH + 2 * column;
            _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi64(a, b));
            _mm_storeu_si128((__m128i*)(out + 2 * WIDTH), _mm_unpackhi_epi64(a, b));
            _mm_storeu_si128((__m128i*)(out + 4 * WIDTH), _mm_unpacklo_epi64(c, e));
            _mm_storeu_si128((__m128i*)(out + 6 * WIDTH), _mm_unpackhi_epi64(c, e));
        }
#endif
    for (; column < count; column++)
        for (int d = 0; d < depth; d += 2) std::memcpy(panel + d * WIDTH + 2 * column, rows[column] + d, 4);
}

// Pairs of rows, element by element by turns: depth is `count` rows and, to make it even, one of zeros. `columns` of
// WIDTH are written.
inline void pack_pairs(const int16_t* const* rows, int count, int columns, int16_t* panel) {
    for (int pair = 0; pair < count; pair += 2) {
        const int16_t *one = rows[pair], *other = pair + 1 < count ? rows[pair + 1] : nullptr;
        int16_t* out = panel + pair * WIDTH;
        int c = 0;
#if defined(__AVX2__)
        for (; c + 8 <= columns; c += 8) {
            const __m128i a = _mm_loadu_si128((const __m128i*)(one + c)),
                          b = other ? _mm_loadu_si128((const __m128i*)(other + c)) : _mm_setzero_si128();
            _mm_storeu_si128((__m128i*)(out + 2 * c), _mm_unpacklo_epi16(a, b));
            _mm_storeu_si128((__m128i*)(out + 2 * c + 8), _mm_unpackhi_epi16(a, b));
        }
#endif
        for (; c < columns; c++) out[2 * c] = one[c], out[2 * c + 1] = other ? other[c] : 0;
    }
}

}  // namespace mapar
