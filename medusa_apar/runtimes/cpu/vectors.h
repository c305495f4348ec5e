// Vectors of floats and of int32, as wide as the machine's, and what is done with them one lane like the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mapar {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4;
#else
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return x - vf{}; }

// a * b + c, in one rounding where the machine has that. Left to the compiler, two places that ought to agree may not.
inline vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
inline vf larger(vf a, vf b) { return a > b ? a : b; }

// Four vectors' sums across their lanes, every one in the same order: lane i with i + 8, then i + 4, i + 2, i + 1; on Arm
// neighbours first.
inline void sum4(const vf* v, float* out) {
#if defined(__AVX2__) || defined(__AVX512F__)
    __m128 part[4];
    for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
        const __m512d whole = _mm512_castps_pd((__m512)v[i]);
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]),
                                          _mm256_castpd_ps(_mm512_extractf64x4_pd(whole, 1)));
#else
        const __m256 half = (__m256)v[i];
#endif
        part[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    const __m128 a = _mm_add_ps(_mm_unpacklo_ps(part[0], part[1]), _mm_unpackhi_ps(part[0], part[1]));
    const __m128 b = _mm_add_ps(_mm_unpacklo_ps(part[2], part[3]), _mm_unpackhi_ps(part[2], part[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)));
#elif defined(__aarch64__)
    const float32x4_t low = vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
    vst1q_f32(out, vpaddq_f32(low, vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3])));
#else
    for (int n = 0; n < 4; n++) {
        float part[LANES];
        std::memcpy(part, v + n, sizeof *v);
        for (int width = LANES / 2; width; width /= 2)
            for (int i = 0; i < width; i++) part[i] += part[i + width];
        out[n] = part[0];
    }
#endif
}
inline float sum(vf v) {
    const vf four[4] = {v, {}, {}, {}};
    float out[4];
    sum4(four, out);
    return out[0];
}
inline float largest(vf v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float part[LANES];
    std::memcpy(part, &v, sizeof v);
    return *std::max_element(part, part + LANES);
#endif
}

// v's lanes i and i ^ H as sums and differences: a stage of a Hadamard transform.
template <int H>
inline vf butterfly(vf v) {
    vi other, flip;
    for (int i = 0; i < LANES; i++) {
        other[i] = i ^ H;
        flip[i] = i & H ? (int32_t)0x80000000 : 0;
    }
    vi bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits ^= flip;
    vf signed_v;
    std::memcpy(&signed_v, &bits, sizeof bits);
#if defined(__clang__)
    vf partner;
    for (int i = 0; i < LANES; i++) partner[i] = v[i ^ H];
#else
    const vf partner = __builtin_shuffle(v, other);
#endif
    return partner + signed_v;
}

// The Hadamard transform of N numbers, in place, without its factor: stage by stage from neighbours on.
template <int N>
inline void hadamard(float* x) {
    constexpr int COUNT = N / LANES;
    vf v[COUNT];
    for (int i = 0; i < COUNT; i++) {
        v[i] = butterfly<2>(butterfly<1>(load(x + i * LANES)));
        if constexpr (LANES > 4) v[i] = butterfly<4>(v[i]);
        if constexpr (LANES > 8) v[i] = butterfly<8>(v[i]);
    }
    for (int h = 1; h < COUNT; h *= 2)
        for (int i = 0; i < COUNT; i++)
            if (!(i & h)) {
                const vf low = v[i], high = v[i ^ h];
                v[i] = low + high;
                v[i ^ h] = low - high;
            }
    for (int i = 0; i < COUNT; i++) store(x + i * LANES, v[i]);
}

// The largest amount of many numbers: as bits, so that what is not finite is larger than all that is.
class Peak {
   public:
    void see(vf v) {
        vi bits;
        std::memcpy(&bits, &v, sizeof v);
        bits &= 0x7FFFFFFF;
        most_ = bits > most_ ? bits : most_;
    }
    // NaN where one was not finite.
    float value() const {
        int32_t most = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
        most = _mm512_reduce_max_epi32((__m512i)most_);
#else
        for (int i = 0; i < LANES; i++) most = std::max(most, most_[i]);
#endif
        float found;
        std::memcpy(&found, &most, sizeof found);
        return most < 0x7F800000 ? found : NAN;
    }

   private:
    vi most_ = {};
};

// To the nearest integer, of |x| below 2^22: 1.5 * 2^23 has no bits for less.
inline vf nearest(vf x) { return (x + 12582912.f) - 12582912.f; }

// e^x to 2 ulp, x clamped to where that is a normal number.
inline vf exp(vf x) {
    x = x > splat(88.f) ? splat(88.f) : x < splat(-87.f) ? splat(-87.f) : x;
    vf n = nearest(x * 1.44269504f);
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    vf p = splat(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// cap * tanh(x / cap)
inline vf capped(vf x, float cap) { return cap - 2 * cap / (exp(x * (2 / cap)) + 1.f); }

// x times the logistic function of x, and GELU in its form with tanh (arXiv 1606.08415), which is one of another x.
inline vf silu(vf x) { return x / (exp(-x) + 1.f); }
inline vf gelu(vf x) { return x / (exp(x * (x * x * 0.0713548163f + 1.59576912f) * -1.f) + 1.f); }

}  // namespace mapar
