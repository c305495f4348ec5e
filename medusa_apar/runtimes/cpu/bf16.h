// Products of bfloat16 weights with activations rounded to bfloat16, as torch multiplies them, summed in float32.
//
//   weights      panel[input / 2][16 outputs][2]
//   activations  [input], bfloat16; where nothing multiplies those, floats that were rounded to them
//
// Four ways to take the sums round differently, so a machine has one for all rows: AMX tiles, vdpbf16ps, Arm's bfdot, or
// floats. With each, a row's sums run over its inputs in one order, however many rows there are beside it.
#pragma once

#include "amx.h"
#include "int8.h"

namespace mapar {

constexpr int PAIRS = 16, PAIRED_INPUTS = 2 * PAIRS;  // inputs are padded to these: one tile's

// Sums of some outputs, the weights of two inputs to them, and one row's two activations.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define MAPAR_BF16
typedef uint16_t Half;
constexpr int HALF_ROWS = 12, HALF_PANELS = 2;
typedef __m512 HalfSums;
typedef __m512bh HalfPair;
inline HalfPair half_pair(const uint16_t* w) { return (__m512bh)_mm512_loadu_si512(w); }
inline void half_dot(HalfSums& sums, HalfPair w, int32_t x) {
    sums = _mm512_dpbf16_ps(sums, w, (__m512bh)_mm512_set1_epi32(x));
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MAPAR_BF16
typedef uint16_t Half;
constexpr int HALF_ROWS = 6, HALF_PANELS = 1;
typedef float32x4_t HalfSums;
typedef bfloat16x8_t HalfPair;
inline HalfPair half_pair(const uint16_t* w) { return vld1q_bf16((const bfloat16_t*)w); }
inline void half_dot(HalfSums& sums, HalfPair w, int32_t x) {
    sums = vbfdotq_f32(sums, w, vreinterpretq_bf16_s32(vdupq_n_s32(x)));
}
#else
typedef float Half;
constexpr int HALF_ROWS = LANES == 16 ? 12 : LANES == 8 ? 4 : 6, HALF_PANELS = 1;
#endif
#if defined(MAPAR_AMX) && defined(__AMX_BF16__) && defined(MAPAR_BF16)
#define MAPAR_AMX_BF16
#endif

struct HalfRows {
    const Half* values;
    int stride;
};

// To the nearest bfloat16, ties to even, in a float's upper half; what is no number stays none.
inline vi rounded_bits(vf x) {
    vi bits;
    std::memcpy(&bits, &x, sizeof bits);
    typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
    const vu whole = (vu)bits;  // unsigned, since what is no number may leave the range
    const vi up = (vi)((whole + 0x7FFF + ((whole >> 16) & 1)) & 0xFFFF0000);
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : up;
}

inline void quantise_bf16(const float* x, int count, int padded, Half* out) {
    for (int i = 0; i < padded; i += LANES) {
        float own[LANES] = {};
        std::memcpy(own, x + i, sizeof(float) * std::clamp(count - i, 0, LANES));
        const vi bits = rounded_bits(load(own));
#ifdef MAPAR_BF16
        typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
        typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
        const vh halves = __builtin_convertvector((vu)bits >> 16, vh);
        std::memcpy(out + i, &halves, sizeof halves);
#else
        std::memcpy(out + i, &bits, sizeof bits);
#endif
    }
}

// R rows at P panels side by side: out[panel][row][PANEL].
template <int R, int P>
__attribute__((noinline)) void panels_bf16(const uint16_t* panels, int inputs, const Half* x, int stride, float* out,
                                           int panel_stride) {
    constexpr int PARTS = PANEL / LANES;
#ifdef MAPAR_BF16
    constexpr int V = P * PARTS;
    HalfSums sums[R][V] = {};
    for (int k = 0; k < inputs; k += 2) {
        HalfPair w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            w[v] = half_pair(panels + (size_t)(v / PARTS) * PANEL * inputs + k * PANEL + v % PARTS * 2 * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x + (size_t)r * stride + k, sizeof pair);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) half_dot(sums[r][v], w[v], pair);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            store(out + (size_t)(v / PARTS) * panel_stride + r * PANEL + v % PARTS * LANES, (vf)sums[r][v]);
#else
    for (int p = 0; p < P; p++) {
        vf sums[R][PARTS] = {};
        const uint16_t* w = panels + (size_t)p * PANEL * inputs;
        for (int k = 0; k < inputs; k += 2, w += 2 * PANEL) {
            for (int part = 0; part < PARTS; part++) {
                vi both;
                std::memcpy(&both, w + 2 * part * LANES, sizeof both);
                const vi first_bits = both << 16, second_bits = both & (int32_t)0xFFFF0000;
                vf first, second;
                std::memcpy(&first, &first_bits, sizeof first);
                std::memcpy(&second, &second_bits, sizeof second);
                for (int r = 0; r < R; r++) {
                    const Half* row = x + (size_t)r * stride + k;
                    sums[r][part] = fused(second, splat(row[1]), fused(first, splat(row[0]), sums[r][part]));
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int part = 0; part < PARTS; part++)
                store(out + (size_t)p * panel_stride + r * PANEL + part * LANES, sums[r][part]);
    }
#endif
}

template <int R, int P>
inline void panels_bf16_of(int rows, const uint16_t* panels, int inputs, const Half* x, int stride, float* out,
                           int panel_stride) {
    if (rows == R)
        panels_bf16<R, P>(panels, inputs, x, stride, out, panel_stride);
    else if constexpr (R > 1)
        panels_bf16_of<R - 1, P>(rows, panels, inputs, x, stride, out, panel_stride);
}

#ifdef MAPAR_AMX_BF16
// At most AMX_ROWS rows.
template <int P>
__attribute__((noinline)) void panels_amx_bf16(const uint16_t* panels, int inputs, const Half* x, int stride, int rows,
                                               float* out, int panel_stride) {
    static_assert(P <= 2);
    set_tiles(rows);
    const uint16_t* second = panels + (size_t)PANEL * inputs;
    const bool both = rows > 16;
    const int bytes = stride * sizeof(Half);
    _tile_zero(0);
    if (P == 2) _tile_zero(1);
    if (both) _tile_zero(2);
    if (both && P == 2) _tile_zero(3);
    for (int k = 0; k < inputs; k += PAIRED_INPUTS) {
        _tile_loadd(4, x + k, bytes);
        _tile_loadd(6, panels + (size_t)k * PANEL, 4 * PANEL);
        _tile_dpbf16ps(0, 4, 6);
        if (P == 2) {
            _tile_loadd(7, second + (size_t)k * PANEL, 4 * PANEL);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (both) {
            _tile_loadd(5, x + (size_t)16 * stride + k, bytes);
            _tile_dpbf16ps(2, 5, 6);
            if (P == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 4 * PANEL);
    if (P == 2) _tile_stored(1, out + panel_stride, 4 * PANEL);
    if (both) {
        _tile_stored(2, out + 16 * PANEL, 4 * PANEL);
        if (P == 2) _tile_stored(3, out + panel_stride + 16 * PANEL, 4 * PANEL);
    }
}
#endif

// P panels side by side, of at most half_rows() rows: out[panel][row][PANEL].
template <int P>
inline void multiply_bf16(const uint16_t* panels, int inputs, const HalfRows& x, int first, int rows, float* out,
                          int panel_stride) {
    const Half* values = x.values + (size_t)first * x.stride;
#ifdef MAPAR_AMX_BF16
    if (amx_allowed()) return panels_amx_bf16<P>(panels, inputs, values, x.stride, rows, out, panel_stride);
#endif
    constexpr int TOGETHER = P < HALF_PANELS ? P : HALF_PANELS;
    for (int p = 0; p < P; p += TOGETHER)
        panels_bf16_of<HALF_ROWS, TOGETHER>(rows, panels + (size_t)p * PANEL * inputs, inputs, values, x.stride,
                                            out + (size_t)p * panel_stride, panel_stride);
}

inline int half_rows() {
#ifdef MAPAR_AMX_BF16
    if (amx_allowed()) return AMX_ROWS;
#endif
    return HALF_ROWS;
}

}  // namespace mapar
