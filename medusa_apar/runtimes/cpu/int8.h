// Products of int8 weights with int8 activations, summed in int32 over 64 inputs at a time and then in float32.
//
//   weights      panel[input / 4][16 outputs][4], a scale per output and 64 inputs
//   activations  a scale per row and 64 inputs, as llama.cpp's Q8_0 blocks have one per 32
//
// Both are turned by a Hadamard transform of those 64 first, which leaves their products as they are: one large input
// becomes 64 moderate ones, and takes nothing from the others' steps (QuIP, arXiv 2307.13304; QuaRot, 2404.00456).
//
// Sums of integers have one result in any order, and every way to take them ends in `add_scaled`, group after group. So
// a row's bits are the same whichever instructions took it, and among however many rows.
//
// Instructions by what the compiler was told of the machine. vpdpbusd takes four products a lane, of an unsigned and a
// signed factor: weights get 128 more, and sums begin with what that adds (`Group::start`). vpmaddubsw adds up two
// products in 16 bits, which 2 * 127 * 127 does not leave: the activation takes its sign from the weight, whose amount
// is the unsigned factor. Arm's have two signed ones: sdot takes four products a lane, smmla eight, of two rows and two
// outputs; what has neither adds up two products in 16 bits too.
#pragma once

#include "vectors.h"

namespace mapar {

constexpr int GROUP_INPUTS = 64;  // that share a scale
constexpr int PANEL = 16;         // outputs side by side
constexpr float ROTATED = 8;       // what the transform multiplies lengths with, sqrt(64)
constexpr int QUADS = GROUP_INPUTS / 4, GROUP_BYTES = PANEL * GROUP_INPUTS;

// A row's group of 64 inputs: its step, and what its sums begin with where weights have 128 more.
struct Group {
    float scale;
    int32_t start;
};

// Rows of activations, as steps: [rows][stride] and [rows][stride / 64].
struct Int8Rows {
    const int8_t* steps;
    const Group* groups;
    int stride;
};

// `COLUMNS` outputs' sums, the weights of four inputs to them, and one row's four activations.
#if defined(__AVX512VNNI__)
constexpr int COLUMNS = 16, VECTORS = 2, BEST_ROWS = 8;  // 16 sums of 32 registers
typedef __m512i Sums;
typedef __m512i Quad;
inline Quad quad(const int8_t* w) { return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)0x80)); }
inline Sums start_of(const Group& group) { return _mm512_set1_epi32(group.start); }
inline void dot(Sums& sums, const Quad& w, int32_t x) { sums = _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(x)); }
#elif defined(__AVXVNNI__)
constexpr int COLUMNS = 8, VECTORS = 2, BEST_ROWS = 6;  // 12 sums of 16 registers
typedef __m256i Sums;
typedef __m256i Quad;
inline Quad quad(const int8_t* w) {
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)w), _mm256_set1_epi8((char)0x80));
}
inline Sums start_of(const Group& group) { return _mm256_set1_epi32(group.start); }
inline void dot(Sums& sums, const Quad& w, int32_t x) {
    sums = _mm256_dpbusd_avx_epi32(sums, w, _mm256_set1_epi32(x));
}
#elif defined(__AVX2__)
constexpr int COLUMNS = 8, VECTORS = 1, BEST_ROWS = 8;
typedef __m256i Sums;
struct Quad {
    __m256i amount, weight;
};
inline Quad quad(const int8_t* w) {
    const __m256i weight = _mm256_loadu_si256((const __m256i*)w);
    return {_mm256_abs_epi8(weight), weight};
}
inline Sums start_of(const Group&) { return _mm256_setzero_si256(); }
inline void dot(Sums& sums, const Quad& w, int32_t x) {
    const __m256i signs = _mm256_sign_epi8(_mm256_set1_epi32(x), w.weight);
    const __m256i pairs = _mm256_maddubs_epi16(w.amount, signs);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#elif defined(__aarch64__)
constexpr int COLUMNS = 4, VECTORS = 4, BEST_ROWS = 6;  // 24 sums of 32 registers
typedef int32x4_t Sums;
typedef int8x16_t Quad;
inline Quad quad(const int8_t* w) { return vld1q_s8(w); }
inline Sums start_of(const Group&) { return vdupq_n_s32(0); }
inline void dot(Sums& sums, const Quad& w, int32_t x) {
    const int8x16_t row = vreinterpretq_s8_s32(vdupq_n_s32(x));
#if defined(__ARM_FEATURE_DOTPROD)
    sums = vdotq_s32(sums, w, row);
#else
    sums = vpadalq_s16(sums, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(row)), vmull_high_s8(w, row)));
#endif
}
#else
constexpr int COLUMNS = 8, VECTORS = 1, BEST_ROWS = 4;
struct Sums {
    int32_t v[COLUMNS];
};
typedef const int8_t* Quad;
inline Quad quad(const int8_t* w) { return w; }
inline Sums start_of(const Group&) { return {}; }
inline void dot(Sums& sums, const Quad& w, int32_t x) {
    int8_t row[4];
    std::memcpy(row, &x, sizeof x);
    for (int i = 0; i < COLUMNS; i++)
        for (int k = 0; k < 4; k++) sums.v[i] += w[4 * i + k] * row[k];
}
#endif

// Rows that go side by side at most: `python -m medusa_apar.eval.tiles` measures others (eval/results/cpu/tiles.json).
#ifdef MAPAR_TILE_ROWS
constexpr int MAX_ROWS = MAPAR_TILE_ROWS;
#else
constexpr int MAX_ROWS = BEST_ROWS;
#endif

// Adds a group's sums to a row's outputs.
typedef float cf __attribute__((vector_size(4 * COLUMNS)));
typedef int32_t ci __attribute__((vector_size(4 * COLUMNS)));
inline void add_scaled(float* out, const ci& sums, const cf& weight_scales, float scale) {
    cf before;
    std::memcpy(&before, out, sizeof before);
    const cf factor = weight_scales * scale, floats = __builtin_convertvector(sums, cf);
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
    before = (cf)_mm512_fmadd_ps((__m512)floats, (__m512)factor, (__m512)before);
#elif defined(__FMA__)
    before = (cf)_mm256_fmadd_ps((__m256)floats, (__m256)factor, (__m256)before);
#elif defined(__aarch64__)
    before = (cf)vfmaq_f32((float32x4_t)before, (float32x4_t)floats, (float32x4_t)factor);
#else
    before += floats * factor;
#endif
    std::memcpy(out, &before, sizeof before);
}

// A group's sums of pairs of rows by smmla; its weights begin at `start`. Of an odd number of rows the last goes twice.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool SMMLA = true;
template <int R, int V>
inline void sums_of_pairs(const int8_t* const* weights, size_t start, const int8_t* x, int stride, Sums (&sums)[R][V]) {
    constexpr int COUPLES = (R + 1) / 2;
    int32x4_t squares[COUPLES][V][2];
#pragma GCC unroll 4
    for (int c = 0; c < COUPLES; c++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) squares[c][v][0] = squares[c][v][1] = vdupq_n_s32(0);
    for (int q = 0; q < QUADS; q += 2) {
        int8x16_t rows[COUPLES];
#pragma GCC unroll 4
        for (int c = 0; c < COUPLES; c++) {
            const int8_t *first = x + (size_t)2 * c * stride, *second = 2 * c + 1 < R ? first + stride : first;
            rows[c] = vcombine_s8(vld1_s8(first + 4 * q), vld1_s8(second + 4 * q));
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            const int8_t* w = weights[v] + start + q * 4 * PANEL;
            const int32x4_t four = vreinterpretq_s32_s8(quad(w)), next = vreinterpretq_s32_s8(quad(w + 4 * PANEL));
            const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(four, next)),
                            high = vreinterpretq_s8_s32(vzip2q_s32(four, next));
#pragma GCC unroll 4
            for (int c = 0; c < COUPLES; c++) {
                squares[c][v][0] = vmmlaq_s32(squares[c][v][0], rows[c], low);
                squares[c][v][1] = vmmlaq_s32(squares[c][v][1], rows[c], high);
            }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < COUPLES; c++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            const int64x2_t low = vreinterpretq_s64_s32(squares[c][v][0]), high = vreinterpretq_s64_s32(squares[c][v][1]);
            sums[2 * c][v] = vreinterpretq_s32_s64(vzip1q_s64(low, high));
            if (2 * c + 1 < R) sums[2 * c + 1][v] = vreinterpretq_s32_s64(vzip2q_s64(low, high));
        }
}
#else
constexpr bool SMMLA = false;
template <int R, int V>
void sums_of_pairs(const int8_t* const* weights, size_t start, const int8_t* x, int stride, Sums (&sums)[R][V]);
#endif

// R rows at V times COLUMNS outputs: out[v][row][PANEL].
template <int R, int V>
__attribute__((noinline)) void add_columns(const int8_t* const* weights, const float* const* scales, const int8_t* x,
                                           const Group* groups, int stride, int inputs, float* const* out) {
    const int count = inputs / GROUP_INPUTS, group_stride = stride / GROUP_INPUTS;
    for (int g = 0; g < count; g++) {
        Sums sums[R][V];
        if constexpr (SMMLA && R > 1) {
            sums_of_pairs(weights, (size_t)g * GROUP_BYTES, x + g * GROUP_INPUTS, stride, sums);
        } else {
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) sums[r][v] = start_of(groups[r * group_stride + g]);
            for (int q = 0; q < QUADS; q++) {
                Quad w[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) w[v] = quad(weights[v] + (size_t)g * GROUP_BYTES + q * 4 * PANEL);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    int32_t four;
                    std::memcpy(&four, x + (size_t)r * stride + g * GROUP_INPUTS + 4 * q, sizeof four);
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) dot(sums[r][v], w[v], four);
                }
            }
        }
        for (int v = 0; v < V; v++) {
            cf weight_scales;
            std::memcpy(&weight_scales, scales[v] + g * PANEL, sizeof weight_scales);
            for (int r = 0; r < R; r++) {
                ci whole;
                std::memcpy(&whole, &sums[r][v], sizeof whole);
                add_scaled(out[v] + r * PANEL, whole, weight_scales, groups[r * group_stride + g].scale);
            }
        }
    }
}

template <int R, int V>
inline void add_columns_of(int rows, const int8_t* const* weights, const float* const* scales, const int8_t* x,
                           const Group* groups, int stride, int inputs, float* const* out) {
    if (rows == R)
        add_columns<R, V>(weights, scales, x, groups, stride, inputs, out);
    else if constexpr (R > 1)
        add_columns_of<R - 1, V>(rows, weights, scales, x, groups, stride, inputs, out);
}

// P panels side by side, of rows `first` on: out[panel][row][PANEL], which begins with zeros.
template <int P>
inline void panels_int8(const int8_t* panels, const float* scales, int inputs, const Int8Rows& x, int first, int rows,
                        float* out, int panel_stride) {
    constexpr int PARTS = P * PANEL / COLUMNS, V = PARTS < VECTORS ? PARTS : VECTORS;
    const int8_t* steps = x.steps + (size_t)first * x.stride;
    const Group* groups = x.groups + (size_t)first * (x.stride / GROUP_INPUTS);
    for (int part = 0; part < PARTS; part += V) {
        const int8_t* w[V];
        const float* s[V];
        float* o[V];
        for (int v = 0; v < V; v++) {
            const int panel = (part + v) * COLUMNS / PANEL, column = (part + v) * COLUMNS % PANEL;
            w[v] = panels + (size_t)panel * PANEL * inputs + 4 * column;
            s[v] = scales + (size_t)panel * PANEL * (inputs / GROUP_INPUTS) + column;
            o[v] = out + (size_t)panel * panel_stride + column;
        }
        add_columns_of<MAX_ROWS, V>(rows, w, s, steps, groups, x.stride, inputs, o);
    }
}

// A row's values as steps, the largest of each 64 being 127 of them. What is not finite makes its group's step NaN, and
// so all that comes of the row.
inline void quantise_int8(const float* x, int count, int padded, int8_t* steps, Group* groups) {
    typedef int8_t vb __attribute__((vector_size(LANES)));
    for (int g = 0; g < padded / GROUP_INPUTS; g++, steps += GROUP_INPUTS) {
        alignas(64) float own[GROUP_INPUTS] = {};
        std::memcpy(own, x + g * GROUP_INPUTS, sizeof(float) * std::clamp(count - g * GROUP_INPUTS, 0, GROUP_INPUTS));
        hadamard<GROUP_INPUTS>(own);
        Peak all;
        for (int i = 0; i < GROUP_INPUTS; i += LANES) all.see(load(own + i));
        const float peak = all.value();
        if (!(peak >= 1e-36f)) {  // below, 127 / peak would be no number
            std::memset(steps, 0, GROUP_INPUTS);
            groups[g] = {peak < 1 ? 0.f : NAN, 0};
            continue;
        }
        const float inverse = 127 / peak;
        vi total = {};
        for (int i = 0; i < GROUP_INPUTS; i += LANES) {
            const vi whole = __builtin_convertvector(nearest(load(own + i) * inverse), vi);
            const vb bytes = __builtin_convertvector(whole, vb);
            std::memcpy(steps + i, &bytes, sizeof bytes);
            total += whole;
        }
        int32_t parts[LANES], start = 0;
        std::memcpy(parts, &total, sizeof parts);
        for (int i = 0; i < LANES; i++) start -= 128 * parts[i];
        groups[g] = {peak / 127 / ROTATED, start};
    }
}

}  // namespace mapar
