// Matrix products of few rows with weights that are laid out once, in panels of 16 outputs.
//
// A result depends on its own row and weights alone: every output sums over k in one order, however many rows there are
// and whatever thread takes them, so a row's bits are the same alone and among others.
//
//   float32   panel[k][16]           activations float32
//   bfloat16  panel[k][16]           widened in registers: activations and sums stay float32
//   int8      panel[k / 4][16][4]    activations int8 too: see int8.h
#pragma once

#include "amx.h"
#include "int8.h"
#include "vectors.h"

#include <type_traits>

namespace mapar {

constexpr int PARTS = PANEL / LANES;
constexpr int FLOAT_ROWS = LANES == 16 ? 12 : 6;  // that float32 and bfloat16 take at a time
#ifdef MAPAR_AMX
constexpr int ROW_TILE = AMX_ROWS;
#else
constexpr int ROW_TILE = std::max(FLOAT_ROWS, MAX_ROWS);
#endif

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

struct Matrix {
    int32_t kind, outputs, inputs;  // outputs a multiple of 16, int8 inputs of GROUP_INPUTS: padded with zeros
    const void* panels;
    const float* scales;  // int8: [panel][group][16]
    const float* bias;    // per output, or null
};

// Rows of activations as a matrix wants them: floats, or what they were quantised to.
struct Rows {
    const float* floats;
    int stride;
    Int8Rows ints;
};

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

// R rows of one panel's outputs; `out` holds R rows of 16.
template <int R>
inline void panel(const Matrix& m, int index, const Rows& x, int first, float (*out)[PANEL]) {
    const size_t start = (size_t)index * PANEL * m.inputs;
    if (m.kind == BFLOAT16)
        panel_float<R>((const uint16_t*)m.panels + start, x, first, m.inputs, out);
    else
        panel_float<R>((const float*)m.panels + start, x, first, m.inputs, out);
}

template <int R>
inline void panel_of(int rows, const Matrix& m, int index, const Rows& x, int first, float (*out)[PANEL]) {
    if (rows == R)
        panel<R>(m, index, x, first, out);
    else if constexpr (R > 1)
        panel_of<R - 1>(rows, m, index, x, first, out);
}

// How many rows a tile takes at most.
inline int row_tile(const Matrix& m, int rows) {
    if (m.kind != INT8) return FLOAT_ROWS;
#ifdef MAPAR_AMX
    if (rows >= AMX_LEAST && amx_allowed()) return AMX_ROWS;
#endif
    return MAX_ROWS;
}

template <int P>
inline void int8_tile(const Matrix& m, int index, const Rows& x, int first, int rows, int most, float* out) {
    const size_t start = (size_t)index * PANEL * m.inputs;
    const int8_t* panels = (const int8_t*)m.panels + start;
    const float* scales = m.scales + start / GROUP_INPUTS;
    std::memset(out, 0, sizeof(float) * P * ROW_TILE * PANEL);
#ifdef MAPAR_AMX
    if (most > MAX_ROWS) return panels_amx<P>(panels, scales, m.inputs, x.ints, first, rows, out, ROW_TILE * PANEL);
#endif
    panels_int8<P>(panels, scales, m.inputs, x.ints, first, rows, out, ROW_TILE * PANEL);
}

// Calls use(first row, rows, tile) for every tile of P panels from `index` on: tile[panel][row][16].
template <int P, class Use>
inline void tiles(const Matrix& m, int index, const Rows& x, int rows, Use use) {
    const int most = row_tile(m, rows), count = (rows + most - 1) / most;
    for (int t = 0; t < count; t++) {  // of sizes as equal as can be: a tile of one row costs as much as one of four
        const int first = (int64_t)rows * t / count, size = (int64_t)rows * (t + 1) / count - first;
        alignas(64) float tile[P][ROW_TILE][PANEL];
        if (m.kind == INT8)
            int8_tile<P>(m, index, x, first, size, most, tile[0][0]);
        else
            for (int p = 0; p < P; p++) panel_of<FLOAT_ROWS>(size, m, index + p, x, first, tile[p]);
        if (m.bias)
            for (int p = 0; p < P; p++)
                for (int r = 0; r < size; r++)
                    for (int i = 0; i < PANEL; i++) tile[p][r][i] += m.bias[(index + p) * PANEL + i];
        use(first, size, tile);
    }
}

// Calls use(first panel, how many, as a constant) for panels in pairs, since two side by side share the rows they read.
template <class Use>
inline void in_pairs(int first, int last, Use use) {
    for (; first + 2 <= last; first += 2) use(first, std::integral_constant<int, 2>());
    if (first < last) use(first, std::integral_constant<int, 1>());
}

}  // namespace mapar
