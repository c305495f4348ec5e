// The noise of `reference.noisy`: Gumbel's, a function of seed, thread, position and token, and a cheap bound on it.
#pragma once

#include "vectors.h"

namespace mapar {

// Four words of Philox4x32-10: token 4 * block and the three behind it.
inline void philox(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, uint32_t* out) {
    uint32_t c0 = block, c1 = (uint32_t)position, c2 = (uint32_t)thread, c3 = (uint32_t)(thread >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

inline double gumbel(uint32_t word) { return -std::log(-std::log((word + 0.5) * 0x1p-32)); }

constexpr float MOST_NOISE = 22.9f;  // -log(2^-33)

constexpr int BLOCKS = 8;  // of Philox, side by side: 32 tokens

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Words of 8 blocks: out[word][block], each in the low half of 64 bits.
inline void philox8(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, __m512i* out) {
    const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), m0 = _mm512_set1_epi64(0xD2511F53u),
                  m1 = _mm512_set1_epi64(0xCD9E8D57u);
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c1 = _mm512_set1_epi64((uint32_t)position), c2 = _mm512_set1_epi64((uint32_t)thread),
            c3 = _mm512_set1_epi64((uint32_t)(thread >> 32));
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96), c1 = p1;
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96), c3 = p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const __m512i all[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; i++) out[i] = _mm512_and_si512(all[i], low);
}
inline void words32(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, uint32_t* out) {
    __m512i w[4];
    philox8(seed, thread, position, block, w);
    // (w0 | w1 << 32) of block b is out[4 b], out[4 b + 1].
    const __m512i a = _mm512_or_si512(w[0], _mm512_slli_epi64(w[1], 32)), b = _mm512_or_si512(w[2], _mm512_slli_epi64(w[3], 32));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b));
}
#else
inline void words32(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, uint32_t* out) {
    // Lane by lane, which compilers turn into vectors.
    uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int b = 0; b < BLOCKS; b++)
        c0[b] = block + b, c1[b] = (uint32_t)position, c2[b] = (uint32_t)thread, c3[b] = (uint32_t)(thread >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int b = 0; b < BLOCKS; b++) {
            const uint64_t p0 = (uint64_t)c0[b] * 0xD2511F53u, p1 = (uint64_t)c2[b] * 0xCD9E8D57u;
            c0[b] = (uint32_t)(p1 >> 32) ^ c1[b] ^ k0, c1[b] = (uint32_t)p1;
            c2[b] = (uint32_t)(p0 >> 32) ^ c3[b] ^ k1, c3[b] = (uint32_t)p0;
        }
    for (int b = 0; b < BLOCKS; b++)
        out[4 * b] = c0[b], out[4 * b + 1] = c1[b], out[4 * b + 2] = c2[b], out[4 * b + 3] = c3[b];
}
#endif

// Not below the noise of these words: -log(-log u) <= -log(1 - u), and the logarithm by its exponent and a chord, which
// lies below it.
inline vf most_noise(const uint32_t* words) {
    vi bits;
    std::memcpy(&bits, words, sizeof bits);
    bits = ~bits;  // 1 - u = (~word + 0.5) / 2^32
    typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
    vu unsigned_bits;
    std::memcpy(&unsigned_bits, &bits, sizeof bits);
    const vf rest = __builtin_convertvector(unsigned_bits, vf) + 0.5f;
    vi exponent;
    std::memcpy(&exponent, &rest, sizeof rest);
    vi mantissa = (exponent & 0x7FFFFF) | 0x3F800000;
    vf fraction;
    std::memcpy(&fraction, &mantissa, sizeof mantissa);
    const vf log2 = __builtin_convertvector((exponent >> 23) - 127 - 32, vf) + (fraction - 1.f);
    return log2 * -0.69314718f + 1e-3f;
}

}  // namespace mapar
