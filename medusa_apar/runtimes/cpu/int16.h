// Numbers as int16 steps of a scale, and products of them, summed in int32 in the widest vectors there are. Sums of
// integers have one result in any order.
#pragma once

#include "vectors.h"

namespace mapar {

typedef float vf4 __attribute__((vector_size(16)));
typedef int32_t vi4 __attribute__((vector_size(16)));

constexpr int WIDE = 2 * LANES;  // int16 of a vector

// A row's values as int16 steps, the largest one being `limit` of them; returns the step. What is not finite makes the
// step NaN, and so all that comes of the row. `out` may be x itself where `count` is a multiple of LANES.
inline float quantise(const float* x, int count, int padded, int16_t* out, float limit) {
    Peak peak;
    int i = 0;
    for (; i + LANES <= count; i += LANES) peak.see(load(x + i));
    if (i < count) {
        float rest[LANES] = {};
        std::memcpy(rest, x + i, sizeof(float) * (count - i));
        peak.see(load(rest));
    }
    const float most = peak.value();
    if (!(most > 0)) {
        std::memset(out, 0, sizeof(int16_t) * padded);
        return most;  // 0 or NaN
    }
    typedef int16_t vs __attribute__((vector_size(2 * LANES)));
    const float inverse = limit / most;
    for (i = 0; i + LANES <= count; i += LANES) {
        const vs steps = __builtin_convertvector(__builtin_convertvector(nearest(load(x + i) * inverse), vi), vs);
        std::memcpy(out + i, &steps, sizeof steps);
    }
    for (; i < count; i++) out[i] = (int16_t)std::nearbyintf(x[i] * inverse);
    for (; i < padded; i++) out[i] = 0;
    return most / limit;
}

// The most steps that two factors may have where so many of their products are summed.
inline float most_steps(int products) { return std::floor(std::sqrt((double)INT32_MAX / products)); }

// Adds to each lane two of the products of a and b [WIDE]: of neighbours, on Arm of elements half a vector apart.
inline void add_dot(vi& sums, const int16_t* a, const int16_t* b) {
#if defined(__AVX512VNNI__)
    sums = (vi)_mm512_dpwssd_epi32((__m512i)sums, _mm512_loadu_si512(a), _mm512_loadu_si512(b));
#elif defined(__AVX512F__) && defined(__AVX512BW__)
    sums += (vi)_mm512_madd_epi16(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
#elif defined(__AVX2__)
    sums += (vi)_mm256_madd_epi16(_mm256_loadu_si256((const __m256i*)a), _mm256_loadu_si256((const __m256i*)b));
#elif defined(__aarch64__)
    const int16x8_t x = vld1q_s16(a), y = vld1q_s16(b);
    sums = (vi)vmlal_high_s16(vmlal_s16((int32x4_t)sums, vget_low_s16(x), vget_low_s16(y)), x, y);
#else
    for (int i = 0; i < LANES; i++) sums[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
#endif
}

// Four vectors' sums across their lanes.
inline vi4 sum4(const vi* v) {
#if defined(__AVX2__)
    __m256i half[4];
    for (int i = 0; i < 4; i++)
#if defined(__AVX512F__) && defined(__AVX512BW__)
        half[i] = _mm256_add_epi32(_mm512_castsi512_si256((__m512i)v[i]), _mm512_extracti64x4_epi64((__m512i)v[i], 1));
#else
        half[i] = (__m256i)v[i];
#endif
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
    return (vi4)_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#elif defined(__aarch64__)
    const int32x4_t low = vpaddq_s32((int32x4_t)v[0], (int32x4_t)v[1]);
    return (vi4)vpaddq_s32(low, vpaddq_s32((int32x4_t)v[2], (int32x4_t)v[3]));
#else
    vi4 out = {};
    for (int n = 0; n < 4; n++)
        for (int i = 0; i < LANES; i++) out[n] += v[n][i];
    return out;
#endif
}

// Two rows of WIDE int16, element by element by turns, and sums of their products with a pair of weights. The sums lie as
// the instructions that weave leave them, until `in_order`.
struct WovenSums {
    vi low, high;
};
#if defined(__AVX512F__) && defined(__AVX512BW__)
struct Woven {
    __m512i low, high;
};
inline Woven weave(const int16_t* a, const int16_t* b) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    return {_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y)};
}
inline void add_products(WovenSums& sums, const Woven& rows, int32_t weights) {
    const __m512i both = _mm512_set1_epi32(weights);
#if defined(__AVX512VNNI__)
    sums.low = (vi)_mm512_dpwssd_epi32((__m512i)sums.low, rows.low, both);
    sums.high = (vi)_mm512_dpwssd_epi32((__m512i)sums.high, rows.high, both);
#else
    sums.low += (vi)_mm512_madd_epi16(rows.low, both);
    sums.high += (vi)_mm512_madd_epi16(rows.high, both);
#endif
}
inline WovenSums in_order(const WovenSums& sums) {
    const __m512i low = (__m512i)sums.low, high = (__m512i)sums.high;
    return {(vi)_mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high),
            (vi)_mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high)};
}
#elif defined(__AVX2__)
struct Woven {
    __m256i low, high;
};
inline Woven weave(const int16_t* a, const int16_t* b) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)a), y = _mm256_loadu_si256((const __m256i*)b);
    return {_mm256_unpacklo_epi16(x, y), _mm256_unpackhi_epi16(x, y)};
}
inline void add_products(WovenSums& sums, const Woven& rows, int32_t weights) {
    const __m256i both = _mm256_set1_epi32(weights);
    sums.low += (vi)_mm256_madd_epi16(rows.low, both);
    sums.high += (vi)_mm256_madd_epi16(rows.high, both);
}
inline WovenSums in_order(const WovenSums& sums) {
    const __m256i low = (__m256i)sums.low, high = (__m256i)sums.high;
    return {(vi)_mm256_permute2x128_si256(low, high, 0x20), (vi)_mm256_permute2x128_si256(low, high, 0x31)};
}
#elif defined(__aarch64__)
struct Woven {
    int16x8_t a, b;
};
inline Woven weave(const int16_t* a, const int16_t* b) { return {vld1q_s16(a), vld1q_s16(b)}; }
inline void add_products(WovenSums& sums, const Woven& rows, int32_t weights) {
    const int16x4_t w = vreinterpret_s16_s32(vdup_n_s32(weights));
    const int32x4_t low = vmlal_lane_s16((int32x4_t)sums.low, vget_low_s16(rows.a), w, 0),
                    high = vmlal_high_lane_s16((int32x4_t)sums.high, rows.a, w, 0);
    sums.low = (vi)vmlal_lane_s16(low, vget_low_s16(rows.b), w, 1);
    sums.high = (vi)vmlal_high_lane_s16(high, rows.b, w, 1);
}
inline WovenSums in_order(const WovenSums& sums) { return sums; }
#else
struct Woven {
    const int16_t *a, *b;
};
inline Woven weave(const int16_t* a, const int16_t* b) { return {a, b}; }
inline void add_products(WovenSums& sums, const Woven& rows, int32_t weights) {
    int16_t w[2];
    std::memcpy(w, &weights, sizeof weights);
    for (int i = 0; i < LANES; i++) {
        sums.low[i] += rows.a[i] * w[0] + rows.b[i] * w[1];
        sums.high[i] += rows.a[LANES + i] * w[0] + rows.b[LANES + i] * w[1];
    }
}
inline WovenSums in_order(const WovenSums& sums) { return sums; }
#endif

}  // namespace mapar
