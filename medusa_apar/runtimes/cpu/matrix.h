// Matrix products of few rows with weights that are laid out once, in panels of 16 outputs.
//
// A result depends on its own row and weights alone: every output sums over k in one order, however many rows there are
// and whatever thread takes them, so a row's bits are the same alone and among others.
//
//   float32   panel[k][16]           activations float32
//   bfloat16  panel[k][16]           widened in registers: activations and sums stay float32
//   int8      panel[k / 2][16][2]    activations int16 with a scale per row, products of pairs summed in int32; every 64 k
//                                    the sums are scaled and go on in float32
//
// int16 activations cost the multiplier what int8 ones would without VNNI (vpmaddwd takes 16 products a vector,
// vpmaddubsw 32 but another vpmaddwd to widen them), cannot saturate, and leave the weights' rounding as the only error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mapar {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16, ROW_TILE = 12;
#else
constexpr int LANES = 8, ROW_TILE = 6;
#endif
constexpr int PANEL = 16, PARTS = PANEL / LANES;

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return x - vf{}; }
inline vf larger(vf a, vf b) { return a > b ? a : b; }

// Four vectors' sums across their lanes, every one in the same order: lane i with i + 8, then i + 4, i + 2, i + 1.
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
    float part[LANES];
    std::memcpy(part, &v, sizeof v);
    return *std::max_element(part, part + LANES);
}

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

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

constexpr int GROUP_INPUTS = 64;  // int8: inputs that share a scale; 64 products of 127 and 32767 fit in int32

struct Matrix {
    int32_t kind, outputs, inputs;  // outputs a multiple of 16, int8 inputs of GROUP_INPUTS: padded with zeros
    const void* panels;
    const float* scales;  // int8: [panel][group][16]
    const float* bias;    // per output, or null
};

// Rows of activations as a matrix wants them.
struct Rows {
    const float* floats;
    const int16_t* ints;
    const float* scales;  // per row
    int stride;
};

// A row's values as int16 steps, the largest one being `limit` of them; returns the step. What is not finite makes the
// step NaN, and so all that comes of the row. `out` may be x itself where `count` is a multiple of LANES.
inline float quantise(const float* x, int count, int padded, int16_t* out, float limit = 32767) {
    vf peak = {}, zeros = {};
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vf v = load(x + i);
        peak = larger(peak, larger(v, -v));
        zeros += v * 0.f;
    }
    float most = largest(peak), zero = sum(zeros);
    for (; i < count; i++) {
        most = std::max(most, std::fabs(x[i]));
        zero += x[i] * 0.f;
    }
    if (!(zero == 0) || most == 0) {
        std::memset(out, 0, sizeof(int16_t) * padded);
        return zero == 0 ? 0.f : NAN;
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

inline vf widen(const float* p) { return load(p); }
inline vf widen(const uint16_t* p) {  // bfloat16
    typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
    typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
    vh half;
    std::memcpy(&half, p, sizeof half);
    vu bits = __builtin_convertvector(half, vu) << 16;
    vf v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

template <int R, class Weight>
__attribute__((noinline)) void panel_float(const Weight* w, const Rows& x, int first, int inputs,
                                           float (*out)[PANEL]) {
    vf sums[R][PARTS] = {};
    const float* row[R];
    for (int r = 0; r < R; r++) row[r] = x.floats + (size_t)(first + r) * x.stride;
    for (int k = 0; k < inputs; k++, w += PANEL) {
        vf weight[PARTS];
        for (int p = 0; p < PARTS; p++) weight[p] = widen(w + p * LANES);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < PARTS; p++) sums[r][p] += weight[p] * row[r][k];
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < PARTS; p++) store(out[r] + p * LANES, sums[r][p]);
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
struct Pairs {  // 16 outputs, two k each
    __m512i v;
};
struct Sums {
    __m512i v;
};
inline Pairs pairs(const int8_t* w) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w))}; }
inline void add_products(Sums& sums, const Pairs& w, int32_t x) {
#if defined(__AVX512VNNI__)
    sums.v = _mm512_dpwssd_epi32(sums.v, w.v, _mm512_set1_epi32(x));
#else
    sums.v = _mm512_add_epi32(sums.v, _mm512_madd_epi16(w.v, _mm512_set1_epi32(x)));
#endif
}
inline void to_int32(const Sums& sums, int32_t* out) { _mm512_storeu_si512(out, sums.v); }
#elif defined(__AVX2__)
struct Pairs {
    __m256i low, high;
};
struct Sums {
    __m256i low, high;
};
inline Pairs pairs(const int8_t* w) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)),
            _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)))};
}
inline void add_products(Sums& sums, const Pairs& w, int32_t x) {
    // In assembly, because gcc otherwise loads every row's activations before it uses the first, and spills the sums:
    // six rows take all 16 registers.
    const __m256i both = _mm256_set1_epi32(x);
    __m256i low = sums.low, high = sums.high, products;
    asm volatile(
        "vpmaddwd %[w0], %[x], %[t]\n\tvpaddd %[t], %[low], %[low]\n\t"
        "vpmaddwd %[w1], %[x], %[t]\n\tvpaddd %[t], %[high], %[high]"
        : [low] "+x"(low), [high] "+x"(high), [t] "=&x"(products)
        : [w0] "x"(w.low), [w1] "x"(w.high), [x] "x"(both));
    sums = {low, high};
}
inline void to_int32(const Sums& sums, int32_t* out) {
    _mm256_storeu_si256((__m256i*)out, sums.low);
    _mm256_storeu_si256((__m256i*)(out + 8), sums.high);
}
#else
struct Pairs {
    const int8_t* w;
};
struct Sums {
    int32_t v[PANEL];
};
inline Pairs pairs(const int8_t* w) { return {w}; }
inline void add_products(Sums& sums, const Pairs& w, int32_t x) {
    int16_t pair[2];
    std::memcpy(pair, &x, sizeof x);
    for (int i = 0; i < PANEL; i++) sums.v[i] += w.w[2 * i] * pair[0] + w.w[2 * i + 1] * pair[1];
}
inline void to_int32(const Sums& sums, int32_t* out) { std::memcpy(out, sums.v, sizeof sums.v); }
#endif

template <int R>
__attribute__((noinline)) void panel_int(const int8_t* w, const float* scales, const Rows& x, int first, int inputs,
                      float (*out)[PANEL]) {
    const int16_t* row[R];
    vf sums[R][PARTS] = {};  // float32, over groups
    for (int r = 0; r < R; r++) row[r] = x.ints + (size_t)(first + r) * x.stride;
    for (int start = 0; start < inputs; start += GROUP_INPUTS, scales += PANEL) {
        Sums group[R] = {};
        for (int k = start; k < start + GROUP_INPUTS; k += 2, w += 2 * PANEL) {
            const Pairs weight = pairs(w);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                int32_t pair;
                std::memcpy(&pair, row[r] + k, sizeof pair);
                add_products(group[r], weight, pair);
            }
        }
        for (int r = 0; r < R; r++) {
            alignas(64) int32_t whole[PANEL];
            to_int32(group[r], whole);
            for (int p = 0; p < PARTS; p++) {
                vi part;
                std::memcpy(&part, whole + p * LANES, sizeof part);
                sums[r][p] += __builtin_convertvector(part, vf) * load(scales + p * LANES);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < PARTS; p++) store(out[r] + p * LANES, sums[r][p] * x.scales[first + r]);
}

// R rows of one panel's outputs; `out` holds R rows of 16.
template <int R>
inline void panel(const Matrix& m, int index, const Rows& x, int first, float (*out)[PANEL]) {
    const size_t start = (size_t)index * PANEL * m.inputs;
    if (m.kind == INT8)
        panel_int<R>((const int8_t*)m.panels + start, m.scales + start / GROUP_INPUTS, x, first, m.inputs, out);
    else if (m.kind == BFLOAT16)
        panel_float<R>((const uint16_t*)m.panels + start, x, first, m.inputs, out);
    else
        panel_float<R>((const float*)m.panels + start, x, first, m.inputs, out);
    if (m.bias)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < PANEL; i++) out[r][i] += m.bias[index * PANEL + i];
}

template <int R>
inline void panel_of(int rows, const Matrix& m, int index, const Rows& x, int first, float (*out)[PANEL]) {
    if (rows == R)
        panel<R>(m, index, x, first, out);
    else if constexpr (R > 1)
        panel_of<R - 1>(rows, m, index, x, first, out);
}

// Calls use(first row, rows, tile) for every tile of so many panels from `index` on: tile[panel][row][16].
template <int PANELS, class Use>
inline void tiles(const Matrix& m, int index, const Rows& x, int rows, Use use) {
    const int count = (rows + ROW_TILE - 1) / ROW_TILE;
    for (int t = 0; t < count; t++) {  // of sizes as equal as can be: a tile of one row costs as much as one of four
        const int first = rows * t / count, size = rows * (t + 1) / count - first;
        alignas(64) float tile[PANELS][ROW_TILE][PANEL];
        for (int p = 0; p < PANELS; p++) panel_of<ROW_TILE>(size, m, index + p, x, first, tile[p]);
        use(first, size, tile);
    }
}

}  // namespace mapar
