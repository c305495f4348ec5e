// Matrix products of few rows with weights that are laid out once, in panels of 16 outputs.
//
// A result depends on its own row and weights alone: every output sums over k in one order, however many rows there are
// and whatever thread takes them, so a row's bits are the same alone and among others.
//
//   float32   panel[k][16]           activations float32
//   bfloat16  panel[k / 2][16][2]    activations bfloat16 too: see bf16.h
//   int8      panel[k / 4][16][4]    activations int8 too: see int8.h
#pragma once

#include "bf16.h"
#include "int8.h"
#include "vectors.h"

#include <type_traits>

namespace mapar {

constexpr int PARTS = PANEL / LANES;
constexpr int FLOAT_ROWS = LANES == 16 ? 12 : 6;  // that float32 takes at a time
#ifdef MAPAR_AMX
constexpr int ROW_TILE = AMX_ROWS;
#else
constexpr int ROW_TILE = std::max({FLOAT_ROWS, MAX_ROWS, HALF_ROWS});
#endif

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

struct Matrix {
    int32_t kind, outputs, inputs;  // padded with zeros: outputs to 16, inputs in int8 to 64, in bfloat16 to 32
    const void* panels;
    const float* scales;  // int8: [panel][group][16]
    const float* bias;    // per output, or null
};

// Rows of activations as a matrix wants them: floats, or what they were quantised to.
struct Rows {
    const float* floats;
    int stride;
    Int8Rows ints;
    HalfRows halves;
};

// R rows of one panel's outputs; `out` holds R rows of 16.
template <int R>
__attribute__((noinline)) void panel_float(const Matrix& m, int index, const Rows& x, int first, float (*out)[PANEL]) {
    const float* w = (const float*)m.panels + (size_t)index * PANEL * m.inputs;
    vf sums[R][PARTS] = {};
    const float* row[R];
    for (int r = 0; r < R; r++) row[r] = x.floats + (size_t)(first + r) * x.stride;
    for (int k = 0; k < m.inputs; k++, w += PANEL) {
        vf weight[PARTS];
        for (int p = 0; p < PARTS; p++) weight[p] = load(w + p * LANES);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < PARTS; p++) sums[r][p] += weight[p] * row[r][k];
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < PARTS; p++) store(out[r] + p * LANES, sums[r][p]);
}

template <int R>
inline void panel_of(int rows, const Matrix& m, int index, const Rows& x, int first, float (*out)[PANEL]) {
    if (rows == R)
        panel_float<R>(m, index, x, first, out);
    else if constexpr (R > 1)
        panel_of<R - 1>(rows, m, index, x, first, out);
}

// How many rows a tile takes at most.
inline int row_tile(const Matrix& m, int rows) {
    if (m.kind == FLOAT32) return FLOAT_ROWS;
    if (m.kind == BFLOAT16) return half_rows();
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
        if (m.kind == BFLOAT16)
            multiply_bf16<P>((const uint16_t*)m.panels + (size_t)index * PANEL * m.inputs, m.inputs, x.halves, first,
                             size, tile[0][0], ROW_TILE * PANEL);
        else if (m.kind == INT8)
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
